"""One needle trial: greedy answering with the model's cache, and the key that each head looks at most in every step."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.probes.live_model import LiveModel
from moescope.probes.phenomena.head_map import HeadMap
from moescope.probes.phenomena.needle_decoding import AnswerEnds, Steps, decoded, prefilled
from moescope.probes.phenomena.needle_prompts import NeedlePrompt
from moescope.probes.phenomena.needles import unigram_recall, words

RECALL = 0.5  # of the answer, over which a trial counts

Heads = NDArray[np.float64]


@dataclass(frozen=True)
class Credits:
    """What one trial gives each head.

    Attributes:
        score: [head] by the authors' code: 1 / (answer's tokens) for each step in which the head's top key lies in the answer
            and the token written is the one there; a place may be credited several times.
        once: [head] each place of the answer credited once at most: share of the answer the head copied, at most 1.
        chance, chance_once, chance_active: [head] expected score, the same with each place once, and probability of any score,
            of a head whose top key is drawn evenly from those it can see.
    """

    score: Heads
    once: Heads
    chance: Heads
    chance_once: Heads
    chance_active: Heads


@dataclass(frozen=True)
class Response:
    """What a model answered.

    Attributes:
        ids: its tokens, without what ended it.
        text: empty without a tokenizer.
        recall: ROUGE-1 recall of the needle's answer in it: share of the answer's words that are there.
        exact: whether the answer is there, word by word.
    """

    ids: tuple[int, ...]
    text: str
    recall: float
    exact: bool

    @property
    def counted(self) -> bool:
        """Whether its trial counts: recall is over a half."""
        return self.recall > RECALL


@dataclass(frozen=True)
class Trial:
    """One prompt, answered.

    Attributes:
        prompt: what was asked.
        response: what was answered.
        free: credits of the greedy answer; None where attention was not read.
        given: credits where the needle's own answer was fed instead; None where that was not run.
        hidden_layers: layers whose sliding window had left the whole answer behind when the first token was written.
    """

    prompt: NeedlePrompt
    response: Response
    free: Credits | None = None
    given: Credits | None = None
    hidden_layers: tuple[int, ...] = field(default=())


def credits_of(steps: Steps, ids: Sequence[int], span: tuple[int, int]) -> Credits:
    """The credits of each head for an answer.

    Args:
        steps: what its steps showed.
        ids: the prompt.
        span: the answer's places in it.

    Example:
        >>> steps = Steps(np.array([7, 8, 8]), np.array([[1], [2], [2]]), np.full((3, 1), 4))
        >>> found = credits_of(steps, [5, 7, 8, 6], (1, 3))
        >>> found.score.tolist(), found.once.tolist()
        ([1.5], [1.0])
    """
    start, stop = span
    answer = np.asarray(ids[start:stop])
    heads = steps.looked.shape[1]
    score, chance, never = np.zeros(heads), np.zeros(heads), np.ones(heads)
    copied, missed = np.zeros((stop - start, heads), bool), np.ones((stop - start, heads))
    for step, (written, looked, keys) in enumerate(zip(steps.written, steps.looked, steps.keys, strict=True)):
        inside = (looked >= start) & (looked < stop)
        place = np.where(inside, looked - start, 0)
        hit = inside & (answer[place] == written)
        score += hit
        copied[place[hit], np.flatnonzero(hit)] = True
        seen = np.arange(start, stop)[:, None] >= len(ids) + step - keys
        right = (answer == written)[:, None] & seen
        chance += right.sum(0) / keys
        never *= 1 - right.sum(0) / keys
        missed *= 1 - right / keys
    n = stop - start
    return Credits(score / n, copied.mean(0), chance / n, 1 - missed.mean(0), 1 - never)


def run_trial(
    model: LiveModel,
    prompt: NeedlePrompt,
    heads: HeadMap | None,
    *,
    steps: int = 50,
    given: bool = True,
) -> Trial:
    """Answer one prompt greedily, and look at the heads meanwhile.

    The prompt without its last token runs through the model's own kernel; from there on each step is one token with the
    model's cache, its first being the last of the prompt, and only these steps are looked at. An answer ends with an
    end-of-sequence token, with a line break after its first words, or after `steps` tokens.

    Args:
        model: runs.
        prompt: what is asked.
        heads: whose attention to read; None to answer only.
        steps: tokens of an answer at most.
        given: feed the needle's answer too, from the same prompt, and see where heads look while it is told.

    Raises:
        InputError: a model without a cache.
    """
    ids = torch.tensor([prompt.ids], device=model.device)
    before = len(prompt.ids) - 1
    ended = AnswerEnds(model)
    with torch.no_grad():
        cache = prefilled(model, ids[:, :-1])
        second = copy.deepcopy(cache) if given and heads is not None else None
        free = decoded(model, heads, ids[:, -1:], cache, before, steps, ended)
        told = None
        if second is not None:
            answer = prompt.ids[slice(*prompt.span)]
            told = decoded(model, heads, ids[:, -1:], second, before, len(answer), ended, told=answer)
    response = response_of(model, prompt, free.written.tolist(), ended)
    return Trial(
        prompt,
        response,
        credits_of(free, prompt.ids, prompt.span) if heads is not None else None,
        credits_of(told, prompt.ids, prompt.span) if told is not None else None,
        _hidden(heads, prompt),
    )


def response_of(model: LiveModel, prompt: NeedlePrompt, written: Sequence[int], ended: AnswerEnds) -> Response:
    """Judge the tokens that were written, the end or line break left out; without a tokenizer, over ids."""
    ids = tuple(written[:-1] if ended(written) else written)
    text = model.tokenizer.decode(list(ids)) if model.tokenizer is not None else ""
    if prompt.needle is None or model.tokenizer is None:
        answer = prompt.ids[slice(*prompt.span)]
        places = range(len(ids) - len(answer) + 1)
        return Response(ids, text, unigram_recall(answer, ids), any(ids[i : i + len(answer)] == answer for i in places))
    want, have = words(prompt.needle.answer), words(text)
    return Response(ids, text, unigram_recall(want, have), f" {' '.join(want)} " in f" {' '.join(have)} ")


def _hidden(heads: HeadMap | None, prompt: NeedlePrompt) -> tuple[int, ...]:
    if heads is None:
        return ()
    return tuple(
        place.layer
        for place in heads.places
        if place.window is not None and len(prompt.ids) - place.window >= prompt.span[1]
    )
