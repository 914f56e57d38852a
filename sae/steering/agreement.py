"""Paraphrase agreement: whether a model answers texts that mean the same alike, unedited and steered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.core.statistics import bootstrap_ratio
from moescope.probes.batches import Batch, BatchPlan
from moescope.probes.corpus import Corpus
from moescope.probes.effects.variants import alternately
from moescope.probes.forward import to_device
from moescope.probes.generation import continue_greedily
from moescope.probes.live_model import LiveModel


@dataclass(frozen=True)
class Agreement:
    """Share of pairs of paraphrases that are answered alike.

    Attributes:
        base, steered: the share without and with the edits.
        difference, ci_low, ci_high: steered less base, with an interval of 95 % over groups of paraphrases.
        pairs, groups: how many there are.
        answers: [group][paraphrase] token ids written, (unedited, steered).
    """

    base: float
    steered: float
    difference: float
    ci_low: float
    ci_high: float
    pairs: int
    groups: int
    answers: tuple[tuple[tuple[tuple[int, ...], tuple[int, ...]], ...], ...]


@torch.no_grad()
def paraphrase_agreement(
    model: LiveModel,
    paraphrases: Sequence[Sequence[str]],
    intervention: Intervention,
    *,
    tokens: int = 1,
    sources: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Agreement:
    """How often two paraphrases of a group are continued by the same tokens, greedily, without and with an intervention.

    The measure of LF-Steering (arXiv 2501.11036); what it costs elsewhere is told by `ms.effect` on unrelated text.

    Args:
        model: that can generate.
        paraphrases: groups of two texts or more that should be answered alike.
        intervention: what steers.
        tokens: of an answer.
        sources: name → autoencoder.
        seed: of the resampling of groups.

    Raises:
        InputError: no group of two texts, or edits that the model cannot take.
    """
    groups = [list(group) for group in paraphrases]
    if not groups or min(map(len, groups)) < 2 or tokens < 1:
        raise InputError("agreement is of groups of two paraphrases or more, and answers of a token or more")
    written: dict[int, list[tuple[int, ...]]] = {0: [], 1: []}
    texts = [text for group in groups for text in group]
    with alternately(model, [intervention], sources=sources) as under:
        for number, text in enumerate(texts):
            batch = _alone(model, text, number)
            for variant in (None, 0):
                with under(variant, [number]):
                    written[0 if variant is None else 1].append(_answer(model, batch, tokens))
    sizes = np.cumsum([0, *map(len, groups)])
    alike, pairs = np.zeros((len(groups), 2)), np.zeros(len(groups))
    for number, (start, end) in enumerate(pairwise(sizes)):
        for one, other in combinations(range(start, end), 2):
            pairs[number] += 1
            for which in (0, 1):
                alike[number, which] += written[which][one] == written[which][other]
    return _told(alike, pairs, written, sizes, seed)


def _told(
    alike: NDArray[np.float64],
    pairs: NDArray[np.float64],
    written: Mapping[int, Sequence[tuple[int, ...]]],
    sizes: NDArray[np.int64],
    seed: int,
) -> Agreement:
    base, steered = alike.sum(0) / pairs.sum()
    value, low, high = bootstrap_ratio(alike[:, 1] - alike[:, 0], pairs, seed=seed)
    answers = tuple(
        tuple(zip(written[0][start:end], written[1][start:end], strict=True)) for start, end in pairwise(sizes)
    )
    return Agreement(
        float(base), float(steered), float(value), float(low), float(high), int(pairs.sum()), len(pairs), answers
    )


def _alone(model: LiveModel, text: str, number: int) -> Batch:
    """A batch of one text: nothing is padded, so that no answer depends on the others."""
    plan = BatchPlan(Corpus.load([text]), model.tokenizer, 1, model.context or 2048, model.anatomy.vocabulary)
    batch = next(iter(plan), None)
    if batch is None:
        raise InputError(f"text {number} is empty", expected="texts to be continued")
    return batch


def _answer(model: LiveModel, batch: Batch, tokens: int) -> tuple[int, ...]:
    fed: list[torch.Tensor] = []
    lengths = continue_greedily(model, to_device(batch, model), tokens, before=fed.append, after=lambda _: None)
    ids = torch.cat(fed[1:], 1)[0].tolist() if len(fed) > 1 else []
    return tuple(ids[: int(lengths[0])])
