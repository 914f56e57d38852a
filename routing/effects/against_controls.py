"""An effect less its controls, on the same resampled documents and resampled draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moescope.core.statistics import document_weights
from moescope.store.run import Run

SUMS_SQL = """
    SELECT
        e.metric,
        e.kind,
        e.draw,
        s.document_id,
        sum(e.sum) AS total,
        sum(e.n)::BIGINT AS n
    FROM effect_sequences e
    JOIN sequences s ON s.sequence_id = e.sequence_id
    WHERE s.run_id = $run AND e.effect_id::VARCHAR = $effect
    GROUP BY e.metric, e.kind, e.draw, s.document_id
    ORDER BY e.metric, e.kind DESC, e.draw, s.document_id
"""

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Difference:
    """An effect less the mean of its controls.

    Attributes:
        value, ci_low, ci_high: in the metric's unit; bounds NaN where all tokens are of one document.
        rank_p: share of controls, the effect itself counted with them, that are at least as large in magnitude.
        between: standard deviation between the controls; NaN for one.
        controls: how many.
    """

    value: float
    ci_low: float
    ci_high: float
    rank_p: float
    between: float
    controls: int


def differences(run: Run, effect_id: str, *, draws: int, seed: int) -> dict[str, Difference]:
    """Metric → what the intervention does beyond its controls, for every metric that both have."""
    frame = run.sql(SUMS_SQL, {"effect": effect_id}).df()
    found = {}
    for metric, part in frame.groupby("metric", sort=False):
        target = part[part["kind"] == "target"].set_index("document_id")
        controls = part[part["kind"] == "control"]
        if target.empty or controls.empty:
            continue
        everywhere = sorted({*target.index, *controls["document_id"]})
        mine = target.reindex(everywhere)[["total", "n"]].fillna(0.0).to_numpy(np.float64)
        sums, n = (_laid(controls, column, everywhere) for column in ("total", "n"))
        found[str(metric)] = beyond_controls(mine[:, 0], sums, mine[:, 1], n, draws=draws, seed=seed)
    return found


def _laid(controls: pd.DataFrame, column: str, documents: list[int]) -> Floats:
    """[draw, document] a column of the controls, 0 where a control has nothing of a document."""
    table = controls.pivot_table(index="draw", columns="document_id", values=column, aggfunc="sum")
    found: Floats = table.reindex(columns=documents).fillna(0.0).to_numpy(np.float64)
    return found


def beyond_controls(
    target: Floats, controls: Floats, n: Floats, control_n: Floats | None = None, *, draws: int, seed: int
) -> Difference:
    """Mean of the effect less the mean of its controls, with a bootstrap interval of 95 % over documents and over draws.

    In every resample the same documents are drawn for all, and the controls are drawn anew with replacement, so that the
    interval holds the spread between draws as well as that between documents.

    Args:
        target: [document] sums; controls: [draw, document] sums.
        n: [document] tokens of the target.
        control_n: [draw, document] tokens of the controls; None for those of the target. (A text too short for a measure
            of what is written has none under one variant, and may have some under another.)
        draws: resamples.
        seed: of the resampling.
    """
    control_n = np.broadcast_to(n, controls.shape) if control_n is None else control_n
    means = np.divide(controls.sum(1), control_n.sum(1), out=np.full(len(controls), np.nan), where=control_n.sum(1) > 0)
    known = np.isfinite(means)
    controls, control_n, means = controls[known], control_n[known], means[known]
    if not len(means) or not n.sum():
        return Difference(float("nan"), float("nan"), float("nan"), float("nan"), float("nan"), len(means))
    value = target.sum() / n.sum()
    # Ties within rounding are ties: an intervention that does nothing ranks among controls that do nothing.
    at_least = np.abs(means) >= abs(value) * (1 - 1e-9)
    rank = (1 + int(at_least.sum())) / (1 + len(means))
    between = float(means.std(ddof=1)) if len(means) > 1 else float("nan")
    low = high = float("nan")
    if len(n) > 1:
        weights = document_weights(len(n), draws=draws, seed=seed).astype(np.float64)
        picked = document_weights(len(means), draws=draws, seed=seed + 1) / len(means)
        tokens, below = weights @ n, weights @ control_n.T
        own = np.divide(weights @ target, tokens, out=np.full(draws, np.nan), where=tokens > 0)
        shares = np.divide(weights @ controls.T, below, out=np.full(below.shape, np.nan), where=below > 0)
        resampled = own - np.where(picked > 0, shares * picked, 0.0).sum(1)
        low, high = (float(bound) for bound in np.nanquantile(resampled, [0.025, 0.975]))
    return Difference(float(value - means.mean()), low, high, rank, between, len(means))


def control_means(rows: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Mean, smallest and largest value of the controls, by the columns given."""
    controls = rows[rows["kind"] == "control"]
    grouped = controls.groupby(by, sort=False, dropna=False)["value"]
    return grouped.agg(null="mean", control_low="min", control_high="max", controls="count").reset_index()
