"""The grid of needle trials, lengths × depths × needles, and what it will cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from moescope.core.errors import InputError
from moescope.probes.live_model import LiveModel
from moescope.probes.phenomena.haystack import haystack
from moescope.probes.phenomena.head_map import HeadMap
from moescope.probes.phenomena.needle_prompts import NeedlePrompt, needle_prompt
from moescope.probes.phenomena.needle_trials import run_trial
from moescope.probes.phenomena.needles import Needle, chosen_needles

LONGEST = 2_048  # tokens of a prompt, where lengths are not given
DEPTHS = (0.1, 0.5, 0.9)
_TIMED = 256  # tokens of the pass by which a grid's time is told


@dataclass(frozen=True)
class NeedleCost:
    """What a grid of needle trials takes.

    Attributes:
        trials: how many.
        tokens: of all prompts.
        seconds: about how long, from one timed pass.
    """

    trials: int
    tokens: int
    seconds: float

    def __str__(self) -> str:
        minutes, seconds = divmod(round(self.seconds), 60)
        took = f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
        return f"{self.trials} needle trials, {self.tokens:,} tokens of prompts: about {took}"


def needle_grid(
    model: LiveModel,
    corpus: Any = None,
    *,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] = DEPTHS,
    needles: int | Sequence[Needle] = 2,
    steps: int = 50,
    chat: bool | None = None,
) -> list[NeedlePrompt]:
    """The prompts of a grid; each takes its text from another passage on.

    Args:
        model: whose tokenizer and context.
        corpus: the texts to hide needles in: anything `Corpus.load` takes; None for a bundled text in the public domain.
        lengths: tokens of prompts; None for 2,048 (or what the context leaves) and half of that.
        depths: shares of the text before the needle, 0 to 1.
        needles: how many of the bundled ones, or needles of one's own.
        steps: tokens of an answer, for which the context must have room too.
        chat: use the tokenizer's chat template; None for where it has one.

    Raises:
        InputError: no tokenizer, no chat template, lengths that the context has no room for or too short for a needle, or a
            needle whose tokens cannot be told.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError(
            "needles are hidden in texts, and this model has no tokenizer",
            fix="pass tokenizer=… to load, or prompts of token ids: NeedlePrompt(ids, span)",
        )
    templated = getattr(tokenizer, "chat_template", None) is not None
    if chat and not templated:
        raise InputError(f"the tokenizer of {model.name} has no chat template", fix="chat=False")
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise InputError("depths are shares of the text before the needle", expected="0 to 1", found=str(depths))
    hidden = chosen_needles(needles)
    hay = haystack(corpus)
    cells = list(product(_lengths(model, lengths, steps), depths, enumerate(hidden)))
    return [
        needle_prompt(
            tokenizer,
            hay,
            needle,
            length=length,
            depth=depth,
            first=cell * len(hay.passages) // len(cells),
            chat=templated if chat is None else chat,
            number=number,
        )
        for cell, (length, depth, (number, needle)) in enumerate(cells)
    ]


def needle_cost(
    model: LiveModel, prompts: Sequence[NeedlePrompt], heads: HeadMap | None, *, steps: int, given: bool
) -> NeedleCost:
    """What trials will take, from one timed pass over the beginning of a prompt and two steps after it."""
    shortest = min(prompts, key=lambda prompt: len(prompt.ids))
    ids = shortest.ids[: max(3, min(_TIMED, len(shortest.ids)))]
    short = NeedlePrompt(ids, (0, 1))
    run_trial(model, NeedlePrompt(ids[:3], (0, 1)), heads, steps=1, given=False)  # what is only slow once
    started = time.perf_counter()
    run_trial(model, short, heads, steps=1, given=False)
    one = time.perf_counter() - started
    started = time.perf_counter()
    run_trial(model, short, heads, steps=3, given=False)
    step = max((time.perf_counter() - started - one) / 2, 0.0)
    tokens = sum(len(prompt.ids) for prompt in prompts)
    answers = sum(steps + (prompt.span[1] - prompt.span[0] if given else 0) for prompt in prompts)
    return NeedleCost(len(prompts), tokens, tokens * max(one - step, 0.0) / len(ids) + answers * step)


def check_room(model: LiveModel, prompts: Sequence[NeedlePrompt], steps: int) -> None:
    """Raise `InputError` where a prompt and its answer do not fit into the context."""
    longest = max(len(prompt.ids) for prompt in prompts)
    if model.context is not None and longest + steps > model.context:
        raise _no_room(longest, steps, model.context)


def _lengths(model: LiveModel, lengths: Sequence[int] | None, steps: int) -> tuple[int, ...]:
    room = LONGEST if model.context is None else model.context - steps
    if lengths is None:
        longest = min(LONGEST, room)
        return (longest // 2, longest)
    if not lengths or min(lengths) < 1:
        raise InputError("lengths are numbers of tokens, at least one", found=str(tuple(lengths)))
    if model.context is not None and max(lengths) > room:
        raise _no_room(max(lengths), steps, model.context)
    return tuple(lengths)


def _no_room(length: int, steps: int, context: int) -> InputError:
    return InputError(
        f"prompts of {length:,} tokens do not fit into this model's context",
        expected=f"at most {context - steps:,}: {context:,} less the {steps} tokens of an answer",
        fix="ask for shorter prompts (lengths)",
    )
