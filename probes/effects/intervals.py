"""From sums by sequence to numbers with intervals: ratios of sums, resampled by document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from moescope.core.statistics import bootstrap_ratio
from moescope.probes.effects.tally import Tallied
from moescope.store.effects import EffectRow, SequenceSums

DRAWS, LEVEL = 1000, 0.95
UNITS = {
    "base_nll": "nats", "delta_nll": "nats", "kl": "nats", "flips": "share",
    "repetition": "share", "distinct_1": "share", "distinct_2": "share", "distinct_3": "share", "length": "tokens",
}  # fmt: skip

Sums = NDArray[np.float64]


def unit_of(metric: str) -> str:
    """Unit of a metric, whatever part of an effect it is (`delta_length`, `content_kl`, …)."""
    return next(unit for name, unit in UNITS.items() if metric.endswith(name))


def token_rows(
    tallied: Tallied,
    variants: Sequence[Mapping[str, Sums]],
    *,
    by_label: bool = True,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[list[EffectRow]]:
    """Rows of several variants over the same tokens: all of them, by label, and by the tally's groups.

    Args:
        tallied: tells sequences, documents, labels, groups and tokens.
        variants: metric → [sequence, group] sums, for each variant.
        by_label: group by label as well.
        draws: bootstrap resamples of documents.
        seed: of the resampling.
    """
    rows: list[list[EffectRow]] = [[] for _ in variants]
    labels = sorted({str(label) for label in tallied.label if label is not None}) if by_label else []
    everything = np.ones(len(tallied.sequence), bool)
    parts = [(group, number, everything) for number, group in enumerate(tallied.groups)]
    parts += [(("label", label), 0, tallied.label == label) for label in labels]
    for (kind, value), number, members in parts:
        chosen = members & (tallied.n[:, number] > 0)
        if not chosen.any():
            continue
        columns = [sums[chosen, number] for variant in variants for sums in variant.values()]
        n = tallied.n[chosen, number]
        found = iter(mean_with_interval(np.stack(columns, -1), n, tallied.document[chosen], draws=draws, seed=seed))
        for variant, made in zip(variants, rows, strict=True):
            made += [EffectRow(kind, value, metric, *next(found), int(n.sum()), unit_of(metric)) for metric in variant]
    return rows


def mean_with_interval(
    sums: Sums, n: NDArray[np.int64], document: NDArray[np.int64], *, draws: int = DRAWS, seed: int = 0
) -> list[tuple[float, float | None, float | None]]:
    """Mean over tokens with a percentile bootstrap interval of 95 % over documents, for each column.

    Args:
        sums: [sequence, column]; n: [sequence] tokens behind them; document: [sequence] ids.

    Returns:
        value, lower and upper bound; no bounds where all tokens are of one document.
    """
    _, place = np.unique(document, return_inverse=True)
    numerator = np.zeros((int(place.max()) + 1, sums.shape[1]))
    denominator = np.zeros(len(numerator))
    np.add.at(numerator, place, sums)
    np.add.at(denominator, place, n)
    value, low, high = bootstrap_ratio(numerator, denominator[:, None], draws=draws, level=LEVEL, seed=seed)
    bounds = [
        tuple(None if np.isnan(bound) else float(bound) for bound in pair) for pair in zip(low, high, strict=True)
    ]
    return [(float(v), *pair) for v, pair in zip(value, bounds, strict=True)]  # type: ignore[misc]  # pairs


def sequence_sums(tallied: Tallied, variant: Mapping[str, Sums]) -> list[SequenceSums]:
    """Sums over all tokens of each sequence, for the metrics of one variant."""
    return [SequenceSums(metric, tallied.sequence, sums[:, 0], tallied.n[:, 0]) for metric, sums in variant.items()]
