"""From readings of the chain to rows of `effects`: values of the model as it is, shares that remain under a cut, with intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.statistics import bootstrap_ratio
from moescope.probes.phenomena.chain_readings import Readings
from moescope.store.effects import EffectRow, SequenceSums

Floats = NDArray[np.float64]
DRAWS = 1000
UNITS = {
    "base_nll": "nats", "delta_nll": "nats", "kl": "nats",
    "base_massive": "activation", "massive_share": "share that remains",
    "base_largest": "activation", "largest_share": "share that remains",
    "base_sink": "attention", "sink_share": "share that remains",
    "base_induction": "attention", "induction_share": "share that remains",
    "base_copy_nll": "nats", "delta_copy_nll": "nats",
    "base_repetition": "share of 4-grams", "delta_repetition": "share of 4-grams",
}  # fmt: skip


def text_rows(base: Readings, cut: Readings, *, layers: range | None, seed: int) -> list[EffectRow]:
    """What a cut does to texts: losses, massive activations, attention to first tokens; all layers together and one by one.

    * `massive_share`: Σ |x| under the cut ÷ Σ |x| without, at the massive activations' places and channel, after the blocks
      where they are massive, over the sequences that have one;
    * `largest_share`: the same of the largest |x| of each text after a block, by layer;
    * `sink_share`: Σ attention to the first token under the cut ÷ without, over heads of all layers behind the block where massive
      activations form (of all layers where none do), and by layer. 1 − this is the decay of sums over heads; the decay
      rate D of arXiv 2507.23279, a mean over heads of ratios, is told by the analysis `sink_decay`.

    Args:
        base, cut: of the same texts.
        layers: after which blocks the activations are massive; None where there are none.
        seed: of the bootstrap over documents.
    """
    rows = [
        _row("all", None, "base_nll", base.nll, base.predicted, base, seed),
        _row("all", None, "delta_nll", cut.nll - base.nll, base.predicted, base, seed),
        _row("all", None, "kl", cut.kl, base.predicted, base, seed),
    ]
    if layers is not None:
        at = list(layers)
        has = (base.massive[:, at] > 0).any(1)
        before, after = (np.where(has, r.massive[:, at].sum(1), 0.0) for r in (base, cut))
        rows.append(_row("all", None, "base_massive", before, np.where(has, len(at), 0), base, seed))
        rows.append(_row("all", None, "massive_share", after, before, base, seed, n=int(has.sum())))
    for layer in range(base.largest.shape[1]):
        before, after = base.largest[:, layer], cut.largest[:, layer]
        rows.append(_row("layer", str(layer), "base_largest", before, np.ones(len(before)), base, seed))
        rows.append(_row("layer", str(layer), "largest_share", after, before, base, seed, n=len(before)))
    behind = base.head_layer > (layers.start if layers is not None else -1)
    groups: list[tuple[str, str | None, NDArray[np.bool_]]] = [("all", None, behind)]
    groups += [("layer", str(layer), base.head_layer == layer) for layer in np.unique(base.head_layer)]
    for kind, value, heads in groups:
        if heads.any():
            before, after = (r.sink[:, heads].sum(1) for r in (base, cut))
            queries = base.tokens * int(heads.sum())
            rows.append(_row(kind, value, "base_sink", before, queries, base, seed))
            rows.append(_row(kind, value, "sink_share", after, before, base, seed, n=int(base.tokens.sum())))
    return [row for row in rows if np.isfinite(row.value)]


def text_sums(base: Readings, cut: Readings) -> list[SequenceSums]:
    """The sums behind the losses, for resampling."""
    return [
        SequenceSums(name, base.sequence, total, base.predicted)
        for name, total in (("base_nll", base.nll), ("delta_nll", cut.nll - base.nll), ("kl", cut.kl))
    ]


def score_rows(metric: str, base: Floats, cut: Floats, *, seed: int) -> list[EffectRow]:
    """What a cut does to a score of some heads, over sequences that are no documents of the corpus.

    Args:
        metric: `induction`: rows `base_induction` and `induction_share`.
        base, cut: [sequence] the score without and with the cut, mean over the heads.
        seed: of the bootstrap over sequences.
    """
    each = np.arange(len(base))
    rows = [
        _ratio("all", None, f"base_{metric}", base, np.ones(len(base)), each, seed, n=len(base)),
        _ratio("all", None, f"{metric}_share", cut, base, each, seed, n=len(base)),
    ]
    return [row for row in rows if np.isfinite(row.value)]


def copy_rows(sums: Floats, tokens: int, number: int, *, seed: int) -> list[EffectRow]:
    """What a cut does to the prediction of repeated random tokens: mean NLL of their later copies, and the change by it.

    Args:
        sums: [variant, sequence] NLL summed over the copies; variant 0 is the model as it is.
        tokens: behind each sum.
        number: of the cut's variant.
        seed: of the bootstrap over sequences.
    """
    each = np.arange(sums.shape[1])
    n = np.full(len(each), tokens)
    pairs = (("base_copy_nll", sums[0]), ("delta_copy_nll", sums[number] - sums[0]))
    return [_ratio("all", None, name, values, n, each, seed, n=int(n.sum())) for name, values in pairs]


def repetition_rows(base: Floats, cut: Floats, *, seed: int) -> list[EffectRow]:
    """Share of 4-grams that occurred before in greedy continuations, without the cut, and the change by it.

    Args:
        base, cut: [prompt]; NaN where a continuation is too short.
        seed: of the bootstrap over prompts.
    """
    known = np.isfinite(base) & np.isfinite(cut)
    if not known.any():
        return []
    before, after, each = base[known], cut[known], np.arange(int(known.sum()))
    ones = np.ones(len(before))
    return [
        _ratio("all", None, "base_repetition", before, ones, each, seed, n=len(before)),
        _ratio("all", None, "delta_repetition", after - before, ones, each, seed, n=len(before)),
    ]


def _row(
    kind: str, value: str | None, metric: str, numerator: Floats, denominator: NDArray[Any],
    base: Readings, seed: int, n: int | None = None,
) -> EffectRow:  # fmt: skip
    count = int(np.sum(denominator)) if n is None else n
    return _ratio(kind, value, metric, numerator, denominator, base.document, seed, n=count)


def _ratio(
    kind: str, value: str | None, metric: str, numerator: Floats, denominator: NDArray[Any],
    document: NDArray[np.int64], seed: int, *, n: int,
) -> EffectRow:  # fmt: skip
    """A ratio of sums with its interval over documents."""
    names, place = np.unique(document, return_inverse=True)
    above, below = np.zeros(len(names)), np.zeros(len(names))
    np.add.at(above, place, numerator)
    np.add.at(below, place, denominator)
    found, low, high = (float(x) for x in bootstrap_ratio(above, below, draws=DRAWS, seed=seed))
    known = np.isfinite(low) and np.isfinite(high)
    return EffectRow(kind, value, metric, found, low if known else None, high if known else None, n, UNITS[metric])
