"""What interventions do to prompts of two sets: loss on either, their difference, and the preference between continuations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.core.statistics import document_weights
from moescope.probes.batches import BatchPlan
from moescope.probes.corpus import Corpus
from moescope.probes.effects.paired import paired_pass
from moescope.probes.effects.tally import TOKEN_METRICS, Tally
from moescope.probes.live_model import LiveModel

Array = NDArray[np.float64]

PREFERENCE = "preference"
BOTH = "a − b"
_TAILS = (0.025, 0.975)


@dataclass(frozen=True)
class Sums:
    """Sums by prompt of what some interventions change.

    Attributes:
        sequence: [prompt] number of the sequence; first: [prompt] whether it is of the first set.
        document: [prompt] the document that it is of, the unit of resampling.
        n: [prompt] what was summed over: predicted tokens, or 1.
        values: metric → [variant, prompt] sums.
    """

    sequence: NDArray[np.int64]
    document: NDArray[np.int64]
    first: NDArray[np.bool_]
    n: Array
    values: dict[str, Array]


@dataclass(frozen=True)
class Estimate:
    """A number of one variant: of the first set, the second, or the first less the second."""

    side: str
    metric: str
    value: float
    low: float
    high: float
    n: int


def loss_sums(
    model: LiveModel,
    corpus: Corpus,
    first_label: str,
    variants: Sequence[Intervention],
    *,
    batch_size: int,
    max_length: int,
) -> Sums:
    """ΔNLL, KL and flips of every prompt under each variant, against the same pass without edits.

    Args:
        model: what runs.
        corpus: labelled prompts.
        first_label: label of the first set.
        variants: interventions.
        batch_size: sequences a pass.
        max_length: tokens of the longest sequence.
    """
    plan = BatchPlan(corpus, model.tokenizer, batch_size, max_length, model.anatomy.vocabulary)
    tally = Tally(groups=())
    for paired in paired_pass(model, plan, variants):
        tally.add(paired)
    done = tally.done()
    values = {name: done.sums[:, number, :, 0] for number, name in enumerate(TOKEN_METRICS)}
    first = np.asarray(done.label == first_label, np.bool_)
    return Sums(done.sequence, done.document, first, done.n[:, 0].astype(np.float64), values)


def preference_sums(
    model: LiveModel,
    corpus: Corpus,
    first_label: str,
    variants: Sequence[Intervention],
    *,
    desired: Sequence[str | Sequence[int]],
    undesired: Sequence[str | Sequence[int]],
    batch_size: int,
    max_length: int,
) -> Sums:
    """How far each variant moves the preference for some continuations over others, prompt by prompt.

    Preference: mean over the desired continuations of log p(continuation | prompt) less the mean over the undesired ones;
    one of the lists may be empty.

    Args:
        model: what runs; texts need its tokenizer.
        corpus: labelled prompts.
        first_label: label of the first set.
        variants: interventions.
        desired, undesired: continuations, as texts or token ids; nothing is put between prompt and continuation.
        batch_size: sequences a pass.
        max_length: tokens of the longest prompt with its continuation.

    Raises:
        InputError: an empty continuation, or a prompt that is too long with one.
    """
    endings = [(continuation_ids(model, c), 1 / len(desired)) for c in desired]
    endings += [(continuation_ids(model, c), -1 / len(undesired)) for c in undesired]
    prompts = [
        (
            sequence.sequence_id,
            sequence.document_id,
            sequence.document.label == first_label,
            sequence.token_ids.tolist(),
        )
        for batch in BatchPlan(corpus, model.tokenizer, batch_size, max_length, model.anatomy.vocabulary)
        for sequence in batch.sequences
    ]
    longest = max(len(ids) for *_, ids in prompts) + max(len(ids) for ids, _ in endings)
    if longest > max_length:
        raise InputError(
            "a prompt with its continuation is too long",
            expected=f"at most {max_length:,} tokens",
            found=f"{longest:,}",
            fix="raise max_length (--max-length), or give shorter prompts",
        )
    rows = [[*ids, *ending] for *_, ids in prompts for ending, _ in endings]
    plan = BatchPlan(Corpus.from_token_ids(rows), None, batch_size, max_length, model.anatomy.vocabulary)
    moved = np.zeros((len(variants), len(prompts)))
    for paired in paired_pass(model, plan, variants):
        for place, sequence in enumerate(paired.batch.sequences):
            prompt, number = divmod(sequence.sequence_id, len(endings))
            begins, weight = len(prompts[prompt][3]), endings[number][1]
            ends = begins + len(endings[number][0])
            moved[:, prompt] -= weight * paired.delta_nll[:, place, begins:ends].sum(-1)
    sequences, documents, first, _ = zip(*prompts, strict=True)
    return Sums(
        np.array(sequences), np.array(documents), np.array(first, np.bool_), np.ones(len(prompts)), {PREFERENCE: moved}
    )


def estimates(sums: Sums, *, draws: int, seed: int) -> list[list[Estimate]]:
    """For each variant, the mean change in either set and its difference, with intervals over documents.

    Args:
        sums: of the prompts.
        draws: resamples of documents, each set by itself.
        seed: of the resamples.
    """
    found: list[list[Estimate]] = [[] for _ in next(iter(sums.values.values()))]
    for metric, values in sums.values.items():
        sides = [_resampled(sums, values, mine, draws, seed + n) for n, mine in enumerate((sums.first, ~sums.first))]
        (a, drawn_a, n_a), (b, drawn_b, n_b) = sides
        parts = [("a", a, drawn_a, n_a), ("b", b, drawn_b, n_b), (BOTH, a - b, drawn_a - drawn_b, n_a + n_b)]
        for side, value, drawn, n in parts:
            low, high = np.quantile(drawn, _TAILS, axis=0)
            for variant, rows in enumerate(found):
                rows.append(Estimate(side, metric, float(value[variant]), float(low[variant]), float(high[variant]), n))
    return found


def _resampled(sums: Sums, values: Array, mine: NDArray[np.bool_], draws: int, seed: int) -> tuple[Array, Array, int]:
    """[variant] mean, [draw, variant] resampled means (NaN for one document), and observations."""
    documents, place = np.unique(sums.document[mine], return_inverse=True)
    numerator = np.stack([np.bincount(place, weights=row, minlength=len(documents)) for row in values[:, mine]])
    denominator = np.bincount(place, weights=sums.n[mine], minlength=len(documents))
    if not denominator.sum():
        raise InputError(
            "no token of a set's prompts is predicted", found="only prompts of one token", fix="give longer prompts"
        )
    mean = numerator.sum(1) / denominator.sum()
    if len(documents) < 2:
        return mean, np.full((draws, len(values)), np.nan), int(denominator.sum())
    weights = document_weights(len(documents), draws=draws, seed=seed).astype(np.float64)
    total = (weights @ denominator)[:, None]
    drawn = np.divide(weights @ numerator.T, total, out=np.full((draws, len(values)), np.nan), where=total > 0)
    return mean, drawn, int(denominator.sum())


def continuation_ids(model: LiveModel, continuation: str | Sequence[int]) -> list[int]:
    """Token ids of a continuation, without special tokens.

    Raises:
        InputError: nothing in it, an id the model does not have, or a text without a tokenizer.
    """
    tokenizer: Any = model.tokenizer
    if isinstance(continuation, str):
        if tokenizer is None:
            raise InputError("this model has no tokenizer", fix="give continuations as token ids")
        found = [int(i) for i in tokenizer(continuation, add_special_tokens=False)["input_ids"]]
    else:
        found = [int(i) for i in continuation]
    if not found or max(found) >= model.anatomy.vocabulary or min(found) < 0:
        raise InputError(
            f"{continuation!r} is no continuation",
            expected=f"at least one token, ids from 0 to {model.anatomy.vocabulary - 1:,}",
        )
    return found
