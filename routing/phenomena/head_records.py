"""Numbers of attention heads, sequence by sequence, from a run's records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.core.statistics import bootstrap_ratio
from moescope.store.run import Run

HEADS_SQL = """
    SELECT s.document_id, h.layer, h.block, h.sums, h.n
    FROM head_sequences h
    JOIN sequences s ON s.run_id = h.run_id AND s.sequence_id = h.sequence_id
    WHERE h.run_id = $run AND h.metric = $metric AND h.condition = $condition
    ORDER BY h.layer, h.block, s.document_id
"""
_CONDITIONS_SQL = """
    SELECT condition
    FROM head_sequences
    WHERE run_id = $run AND metric = $metric
    GROUP BY condition
    ORDER BY condition <> 'base', condition
"""
_METRICS_SQL = "SELECT DISTINCT metric FROM head_sequences WHERE run_id = $run ORDER BY metric"


@dataclass(frozen=True)
class HeadRecord:
    """One number of every head.

    Attributes:
        heads: layer, block, head, in the order of the columns below.
        sums: [document, head] its sum over a document's observations.
        n: [document, head] how many observations.
    """

    heads: pd.DataFrame
    sums: NDArray[np.float64]
    n: NDArray[np.float64]

    @property
    def value(self) -> NDArray[np.float64]:
        """[head] the mean over all observations."""
        total = self.n.sum(0)
        mean: NDArray[np.float64] = np.full(len(self.heads), np.nan)
        np.divide(self.sums.sum(0), total, out=mean, where=total > 0)
        return mean

    @property
    def documents(self) -> int:
        """How many documents stand behind it."""
        return len(self.sums)

    def frame(self, metric: str, *, draws: int, seed: int, null: NDArray[np.float64] | None = None) -> pd.DataFrame:
        """A row a head: layer, block, head, metric, value, ci_low, ci_high, null, n."""
        value, low, high = bootstrap_ratio(self.sums, self.n, draws=draws, seed=seed)
        counts = self.n.sum(0).astype(np.int64)
        found = self.heads.assign(metric=metric, value=value, ci_low=low, ci_high=high, n=counts)
        return found if null is None else found.assign(null=null)


def condition_of(run: Run, metric: str) -> str:
    """The condition of a metric: `base` where it is there, else the first; a run of an edited model has its intervention's."""
    found = run.store.fetch(_CONDITIONS_SQL, {"run": run.run_id, "metric": metric})
    return str(found[0][0]) if found else "base"


def head_record(run: Run, metric: str, *, condition: str | None = None) -> HeadRecord | None:
    """One metric of a run, under a condition, its own where not given; None where the run has none of it."""
    under = condition_of(run, metric) if condition is None else condition
    rows = run.sql(HEADS_SQL, {"metric": metric, "condition": under}).df()
    if rows.empty:
        return None
    documents = np.sort(rows["document_id"].unique())
    number = {int(d): i for i, d in enumerate(documents)}
    places, sums, counts = [], [], []
    for (layer, block), part in rows.groupby(["layer", "block"], sort=True):
        width = len(part["sums"].iloc[0])
        total, n = np.zeros((len(documents), width)), np.zeros((len(documents), width))
        for row in part.itertuples():
            total[number[int(row.document_id)]] += np.asarray(row.sums, np.float64)
            n[number[int(row.document_id)]] += row.n
        places.append(pd.DataFrame({"layer": int(layer), "block": str(block), "head": range(width)}))
        sums.append(total)
        counts.append(n)
    return HeadRecord(pd.concat(places, ignore_index=True), np.hstack(sums), np.hstack(counts))


def needed_record(run: Run, metric: str, *, protocol: str) -> HeadRecord:
    """One metric of a run.

    Raises:
        InputError: the run has none of it, with the protocol that measures it.
    """
    found = head_record(run, metric)
    if found is None:
        has = ", ".join(name for (name,) in run.store.fetch(_METRICS_SQL, {"run": run.run_id})[:6])
        raise InputError(
            f"run {run.name!r} has no {metric}",
            found=f"measures of heads: {has or 'none'}",
            fix=f"measure it: {protocol}",
        )
    return found


def head_name(layer: int, block: str, head: int) -> str:
    """`L3·H7`, or `L3 attn.1·H7` where the block has several attentions.

    Example:
        >>> head_name(3, "attn", 7)
        'L3·H7'
    """
    return f"L{layer}{'' if block == 'attn' else ' ' + block}·H{head}"


def leading(frame: pd.DataFrame, count: int) -> str:
    """The heads of a frame with the largest values, by name with value."""
    order = frame.sort_values(["value", "layer", "block", "head"], ascending=[False, True, True, True], kind="stable")
    return ", ".join(
        f"{head_name(int(r.layer), str(r.block), int(r.head))} {r.value:.2f}" for r in order.head(count).itertuples()
    )


def groups_of(run: Run, heads: pd.DataFrame) -> NDArray[np.int64]:
    """Which key-value head of its layer each head reads; its own number where the run does not tell."""
    told: dict[str, Any] = run.info["summary"].get("key_value_heads") or {}
    width = heads.groupby(["layer", "block"])["head"].transform("size").to_numpy()
    names = [f"{int(layer)} {block}" for layer, block in zip(heads["layer"], heads["block"], strict=True)]
    groups = np.array([int(told.get(name, n)) for name, n in zip(names, width, strict=True)])
    found: NDArray[np.int64] = heads["head"].to_numpy() // np.maximum(width // groups, 1)
    return found
