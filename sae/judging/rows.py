"""Rows of `sae_measures`: a measure with its interval over documents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.statistics import bootstrap_ratio

DRAWS = 1000
# What a judgement writes, and the next one on the same run replaces.
METRICS = (
    "fvu", "normalised_mse", "cosine", "norm_ratio", "explained_variance", "l0", "l0_p05", "l0_p50", "l0_p95", "dead_share",
    "dead_share_training", "dense_share", "max_cosine", "max_cosine_p50", "max_cosine_p95", "max_cosine_p99", "twin_share",
    "probe_loss", "probe_auc", "splitting", "absorption", "own_latents_silent", "ce", "delta_ce", "kl", "flips",
    "loss_recovered_zero", "loss_recovered_mean", "ablation_sparsity",
)  # fmt: skip
Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class MeasureRow:
    """One row of `sae_measures`, but for the autoencoder and the run.

    Attributes:
        metric: what was measured, and `unit` in what.
        condition: `sae`, or the control.
        value: with its interval of 95 % over documents, where it has one.
        n: tokens, latents or concepts behind it.
        group_kind, group_value: what they are grouped by; `all` and None for none.
    """

    metric: str
    condition: str
    value: float
    n: int
    unit: str
    ci_low: float | None = None
    ci_high: float | None = None
    group_kind: str = "all"
    group_value: str | None = None

    def stored(self, sae_id: str, run_id: str) -> dict[str, Any]:
        """The row by column."""
        names = (
            "metric", "condition", "group_kind", "group_value", "value", "ci_low", "ci_high", "n", "unit",
        )  # fmt: skip
        return {"sae_id": sae_id, "run_id": run_id, **{name: getattr(self, name) for name in names}}


class ByDocument:
    """Ratios of sums over rows, with a percentile bootstrap interval of 95 % over their documents.

    Args:
        document: [row] which document each row is of.
        seed: of the resampling.
    """

    def __init__(self, document: NDArray[np.integer[Any]], *, seed: int = 0) -> None:
        self.names, self.place = np.unique(document, return_inverse=True)
        self.seed = seed

    def sums(self, values: Floats) -> Floats:
        """[document, …] sums of [row, …] values."""
        found = np.zeros((len(self.names), *values.shape[1:]))
        np.add.at(found, self.place, values)
        return found

    def ratios(self, above: Floats, below: Floats) -> list[tuple[float, float | None, float | None]]:
        """Σ above / Σ below for each column of [row, column], with bounds; none where there is one document only."""
        return ratios(self.sums(above), self.sums(below), seed=self.seed)

    def means(self, values: Floats) -> list[tuple[float, float | None, float | None]]:
        """Means of the columns of [row, column]."""
        return self.ratios(values, np.ones(values.shape))


def ratios(above: Floats, below: Floats, *, seed: int = 0) -> list[tuple[float, float | None, float | None]]:
    """Ratios of [document, column] sums with their bounds; a ratio over 0 is left out as NaN."""
    value, low, high = bootstrap_ratio(above, below, draws=DRAWS, seed=seed)
    return [(float(v), _bound(a), _bound(b)) for v, a, b in zip(value, low, high, strict=True)]


def _bound(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def finite(rows: Iterable[MeasureRow]) -> list[MeasureRow]:
    """Rows whose value is a number; a ratio over nothing is none."""
    return [row for row in rows if np.isfinite(row.value)]


def groups_of(
    label: NDArray[np.object_], klass: NDArray[np.object_], least: int
) -> list[tuple[str, str, NDArray[np.bool_]]]:
    """Groups of rows by label and by token class that have at least so many rows: kind, value, which rows."""
    found = []
    for kind, values in (("label", label), ("class", klass)):
        for value in sorted({str(v) for v in values if v is not None}):
            members = values == value
            if members.sum() >= least:
                found.append((kind, value, members))
    return found


def quantiles(values: Floats, at: Sequence[float]) -> list[float]:
    """Quantiles of values."""
    return [float(q) for q in np.quantile(values, at)]
