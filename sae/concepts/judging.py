"""Detection and fuzzing: whether a description tells where a unit is active, and on which tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from moescope.core.statistics import document_weights
from moescope.sae.concepts.asking import Asker
from moescope.sae.concepts.prompts import detection_prompt, fuzzing_prompt, read_judgements
from moescope.sae.concepts.windows import Window, Words

_PASSAGES = 5  # a question
_FEWEST = 0.5  # share of the passages that must be judged for a score


@dataclass(frozen=True)
class Score:
    """Balanced accuracy of a judge: mean of the share of true passages called so and of false ones called false.

    Attributes:
        value: 0 to 1; None where too few passages were judged, or none of one kind.
        low, high: bootstrap bounds over documents, None where they are too few.
        judged, unread: passages with an answer that could be read, and without.
    """

    value: float | None
    low: float | None
    high: float | None
    judged: int
    unread: int


@dataclass(frozen=True)
class Item:
    """A window with what is true of it."""

    window: Window
    true: bool


def detection_items(active: Sequence[Window], idle: Sequence[Window], random: np.random.Generator) -> list[Item]:
    """Windows with activity and as many without, shuffled."""
    count = min(len(active), len(idle))
    items = [Item(one, True) for one in active[:count]] + [Item(one, False) for one in idle[:count]]
    return [items[i] for i in random.permutation(len(items))]


def fuzzing_items(active: Sequence[Window], random: np.random.Generator) -> list[Item]:
    """Windows with activity, half of them with as many silent tokens marked in place of the active ones, shuffled."""
    apt = [one for one in active if 0 < one.active.sum() <= (~one.active).sum()]
    apt = apt[: len(apt) // 2 * 2]
    items = []
    for number, window in enumerate(apt):
        if number % 2:
            wrong = np.zeros(len(window.active), bool)
            wrong[random.choice(np.flatnonzero(~window.active), int(window.active.sum()), replace=False)] = True
            items.append(Item(window.marked(wrong), False))
        else:
            items.append(Item(window, True))
    return [items[i] for i in random.permutation(len(items))]


def judge(
    asker: Asker, description: str, items: Sequence[Item], words: Words, *, marks: bool, draws: int, seed: int
) -> Score:
    """Ask about every item, and score the answers; those that could not be read are left out and counted.

    Args:
        asker: the judge.
        description: of the unit.
        items: what is asked about.
        words: text of tokens.
        marks: fuzzing, with marked tokens; else detection.
        draws: bootstrap resamples of documents.
        seed: of these.
    """
    make = fuzzing_prompt if marks else detection_prompt
    answers: list[bool | None] = []
    for start in range(0, len(items), _PASSAGES):
        part = items[start : start + _PASSAGES]
        prompt = make(description, [words.text(one.window, marks=marks) for one in part])
        found = asker.ask(prompt, partial(read_judgements, count=len(part)), _all_read)
        answers += found if found is not None else [None] * len(part)
    return score_answers(
        np.array([one.true for one in items], bool),
        answers,
        [one.window.document for one in items],
        draws=draws,
        seed=seed,
    )


def _all_read(found: Sequence[bool | None]) -> bool:
    return None not in found


def score_answers(
    true: NDArray[np.bool_], answers: Sequence[bool | None], documents: Sequence[int], *, draws: int, seed: int
) -> Score:
    """Balanced accuracy with a bootstrap interval over documents.

    Example:
        >>> score_answers(np.array([True, True, False, False]), [True, False, False, None], [0, 1, 2, 3], draws=0, seed=0).value
        0.75
    """
    read = np.array([one is not None for one in answers], bool)
    unread = int((~read).sum())
    said = np.array([bool(one) for one in answers], bool)[read]
    truth = true[read]
    if not len(truth) or read.mean() < _FEWEST or truth.all() or not truth.any():
        return Score(None, None, None, int(read.sum()), unread)
    known, of = np.unique(np.array(documents)[read], return_inverse=True)
    drawn = (
        document_weights(len(known), draws=draws, seed=seed) if draws and len(known) > 1 else np.empty((0, len(known)))
    )
    weights = np.vstack([np.ones(len(known)), drawn])[:, of]
    with np.errstate(invalid="ignore", divide="ignore"):
        right = [(weights * (side & (said == truth))).sum(1) / (weights * side).sum(1) for side in (truth, ~truth)]
    values = (right[0] + right[1]) / 2
    resampled = values[1:][np.isfinite(values[1:])]
    low, high = np.quantile(resampled, [0.025, 0.975]) if len(resampled) > 1 else (None, None)
    return Score(
        float(values[0]),
        None if low is None else float(low),
        None if high is None else float(high),
        int(read.sum()),
        unread,
    )
