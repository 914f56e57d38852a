"""Prompts that need a circuit, beside prompts like them that do not: whom a thing is given to, later years, repetition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moescope.core.errors import InputError
from moescope.probes.live_model import LiveModel
from moescope.probes.phenomena.repeated_tokens import first_ids, plain_ids

_NAMES = (
    "Mary", "John", "Anna", "Peter", "Laura", "Tom", "Sarah", "Paul", "Emma", "James", "Kate", "Mark", "Alice", "David", "Jane",
    "Robert", "Susan", "Daniel", "Julia", "Simon", "Rachel", "Martin", "Helen", "Adam",
)  # fmt: skip
_GIVING = (
    "After lunch {a} and {b} walked down to the harbour, and {s} handed a letter to",
    "When {a} and {b} arrived at the station, {s} passed the ticket to",
    "While {a} and {b} were cleaning the garage, {s} gave a hammer to",
    "Since {a} and {b} shared an office that year, {s} lent the red stapler to",
)
_LASTING = ("war", "expedition", "strike", "drought", "voyage", "trial", "siege", "project")
_SEGMENT = 24


@dataclass(frozen=True)
class Prompt:
    """What a model is given, and what it should rather say next.

    Attributes:
        ids: token ids.
        text: as text; empty for random tokens.
        answers, wrong: ids of next tokens that are right, and that are wrong; none where the model's own best two are meant.
    """

    ids: tuple[int, ...]
    text: str = ""
    answers: tuple[int, ...] = ()
    wrong: tuple[int, ...] = ()


@dataclass(frozen=True)
class CircuitTask:
    """Prompts of a task.

    Attributes:
        name: of the task.
        positives: prompts that need the circuit.
        negatives: prompts like them that do not.
    """

    name: str
    positives: tuple[Prompt, ...]
    negatives: tuple[Prompt, ...]


def circuit_task(model: LiveModel, task: Any, *, count: int, seed: int = 0) -> CircuitTask:
    """Prompts of a task in our own words, or those given.

    `ioi`: two names, one of them again as the giver, the other is whom it is given to; in negatives the giver is a third.
    `greater_than`: "lasted from the year 1732 to the year 17", later years against earlier ones; in negatives it starts in 01, which
    tells nothing. `induction`: random tokens that come again, the next of them against another; in negatives none comes again.

    Answers are told apart by the first token in which their continuations differ, whatever the tokenizer: of years those tokens count
    that only later (or only earlier) years begin with.

    Args:
        model: whose tokenizer.
        task: one of the names, or (positives, negatives), each a text, token ids, (text, answer, wrong) or a `Prompt`.
        count: prompts of each kind, of a named task.
        seed: of drawing.

    Raises:
        InputError: no such task; no tokenizer for it; prompts without tokens; numbers out of range.

    Example:
        >>> import moescope as ms
        >>> found = circuit_task(ms.load("demo"), "induction", count=4)
        >>> len(found.positives), len(set(found.negatives[0].ids)) == len(found.negatives[0].ids)
        (4, True)
    """
    if count < 4:
        raise InputError(f"a circuit cannot be told from {count} prompts", expected="at least 4 of each kind")
    random = np.random.default_rng(seed)
    makers: dict[str, Callable[[LiveModel, np.random.Generator], tuple[Prompt, Prompt]]] = {
        "ioi": _giving, "greater_than": _later_years, "induction": _repeated,
    }  # fmt: skip
    if isinstance(task, str):
        if task not in makers:
            raise InputError(
                f"there is no task {task!r}", expected=f"{', '.join(makers)}, or (positive prompts, negative prompts)"
            )
        if task != "induction" and model.tokenizer is None:
            raise InputError(
                f"the task {task!r} has texts, but the model has no tokenizer", fix="pass tokenizer=… to load"
            )
        made = [makers[task](model, random) for _ in range(count)]
        return CircuitTask(task, tuple(p for p, _ in made), tuple(n for _, n in made))
    if not isinstance(task, (tuple, list)) or len(task) != 2 or isinstance(task[0], str):
        raise InputError(
            "these are no prompts", expected="(positives, negatives), two lists", found=type(task).__name__
        )
    sides = [tuple(_given(model, prompt) for prompt in side) for side in task]
    if min(map(len, sides)) < 4:
        raise InputError(
            "there are too few prompts", expected="at least 4 of each kind", found=str(min(map(len, sides)))
        )
    return CircuitTask("prompts", sides[0], sides[1])


def _giving(model: LiveModel, random: np.random.Generator) -> tuple[Prompt, Prompt]:
    text = _GIVING[random.integers(len(_GIVING))]
    for _ in range(20):
        a, b, c, d, e = (str(name) for name in random.choice(_NAMES, 5, replace=False))
        giver, other = (a, b) if random.random() < 0.5 else (b, a)
        positive = _against(model, text.format(a=a, b=b, s=giver), f" {other}", f" {giver}")
        negative = _plain(model, text.format(a=c, b=d, s=e))
        if positive is not None:
            return positive, negative
    raise InputError("this tokenizer does not tell names apart", found="a common beginning for every pair")


def _later_years(model: LiveModel, random: np.random.Generator) -> tuple[Prompt, Prompt]:
    noun, century, year = (
        _LASTING[random.integers(len(_LASTING))],
        int(random.integers(12, 20)),
        int(random.integers(15, 85)),
    )
    start = f"The {noun} lasted from the year {century}{{}} to the year {century}"
    text = start.format(f"{year:02}")
    ids = _ids(model, text)
    later: set[int] = set()
    earlier: set[int] = set()
    for other in range(100):
        whole = _ids(model, f"{text}{other:02}")
        if whole[: len(ids)] == ids and len(whole) > len(ids):
            (later if other > year else earlier).add(whole[len(ids)])
    both = later & earlier
    if not later - both or not earlier - both:
        raise InputError(
            "this tokenizer does not write the end of a year as tokens of its own",
            found=f"{len(later)} first tokens of later years, {len(earlier)} of earlier ones",
            fix="take another task",
        )
    return Prompt(ids, text, tuple(sorted(later - both)), tuple(sorted(earlier - both))), _plain(
        model, start.format("01")
    )


def _repeated(model: LiveModel, random: np.random.Generator) -> tuple[Prompt, Prompt]:
    known = plain_ids(model)
    size = min(_SEGMENT, len(known) // 3)
    if size < 4:
        raise InputError("the vocabulary is too small for random tokens", found=f"{len(known)} tokens")
    before = tuple(first_ids(model))
    drawn = [int(i) for i in random.choice(known, 2 * size, replace=False)]
    segment, others = drawn[:size], drawn[size:]
    stop = 3 * size // 4  # one length for all: they run together
    wrong = segment[int(random.choice([i for i in range(size) if abs(i - stop) > 1]))]
    positive = Prompt((*before, *segment, *segment[:stop]), "", (segment[stop],), (wrong,))
    return positive, Prompt((*before, *segment, *others[:stop]))


def _given(model: LiveModel, prompt: Any) -> Prompt:
    """A prompt as the user wrote it."""
    if isinstance(prompt, Prompt):
        found: Prompt | None = prompt
    elif isinstance(prompt, str):
        found = _plain(model, prompt)
    elif isinstance(prompt, (tuple, list)) and len(prompt) == 3 and all(isinstance(part, str) for part in prompt):
        found = _against(model, *prompt)
    elif isinstance(prompt, Sequence) and prompt and all(isinstance(i, (int, np.integer)) for i in prompt):
        found = Prompt(tuple(map(int, prompt)))
    else:
        raise InputError(f"{prompt!r} is no prompt", expected="a text, token ids, or (text, answer, wrong answer)")
    if found is None:
        raise InputError(f"{prompt[1]!r} and {prompt[2]!r} are the same answer to this tokenizer")
    if not found.ids or max(found.ids) >= model.anatomy.vocabulary or min(found.ids) < 0:
        raise InputError(
            f"{prompt!r} has no tokens of this model", expected=f"ids from 0 to {model.anatomy.vocabulary - 1:,}"
        )
    return found


def _against(model: LiveModel, text: str, answer: str, wrong: str) -> Prompt | None:
    """The prompt up to the first token in which two continuations differ; None where one begins the other."""
    one, two = _ids(model, text + answer), _ids(model, text + wrong)
    same = next((n for n, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), None)
    return None if same is None else Prompt(one[:same], text, (one[same],), (two[same],))


def _plain(model: LiveModel, text: str) -> Prompt:
    return Prompt(_ids(model, text), text)


def _ids(model: LiveModel, text: str) -> tuple[int, ...]:
    if model.tokenizer is None:
        raise InputError(
            "the prompts are texts, but the model has no tokenizer", fix="pass token ids, or tokenizer=… to load"
        )
    bare = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return (*first_ids(model), *map(int, bare))
