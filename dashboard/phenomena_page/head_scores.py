"""Scores of attention heads as rows: what was measured, the leading heads, and everything of one head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.dashboard.url_state import Layer, ViewState
from moescope.routing.phenomena.head_map import METRICS_SQL
from moescope.routing.phenomena.head_metrics import in_order
from moescope.routing.phenomena.head_records import head_name
from moescope.store.run import Run

_PLACES_SQL = "SELECT DISTINCT layer, block, head FROM heads WHERE run_id = $run ORDER BY layer, block, head"
_SCORES_SQL = """
    WITH ranked AS (
        SELECT layer, block, head, metric, condition, value, n,
            rank() OVER (PARTITION BY metric, condition ORDER BY value DESC) AS rank,
            count(*) OVER (PARTITION BY metric, condition) AS heads,
            median(value) OVER (PARTITION BY metric, condition) AS middle,
            min(value) OVER (PARTITION BY metric, condition) = max(value) OVER (PARTITION BY metric, condition) AS alike
        FROM heads
        WHERE run_id = $run AND isfinite(value)
    )
    SELECT metric, condition, value, n, rank, heads, middle, alike
    FROM ranked
    WHERE layer = $layer AND block = $block AND head = $head
    ORDER BY metric, condition
"""


@dataclass(frozen=True)
class Head:
    """One query head: its layer, the attention it is of, its number there."""

    layer: int
    block: str
    head: int

    @property
    def name(self) -> str:
        """`L3·H7`, or `L3 attn.1·H7`."""
        return head_name(self.layer, self.block, self.head)

    @property
    def address(self) -> Layer:
        """Its layer as the address writes it."""
        return Layer(self.layer, None if self.block == "attn" else self.block)


def measures(run: Run) -> dict[str, list[str]]:
    """Metric → conditions under which a run has it, those that are asked for most first."""
    found: dict[str, list[str]] = {}
    for metric, condition, _heads in run.sql(METRICS_SQL).fetchall():
        found.setdefault(str(metric), []).append(str(condition))
    return {metric: found[metric] for metric in in_order(list(found))}


def find_head(run: Run, state: ViewState) -> Head | None:
    """The head that the address means; None where it names none.

    Raises:
        InputError: the run has no such head, or the address has a head and no layer.
    """
    if state.head is None:
        return None
    if state.layer is None:
        raise InputError(
            f"the address has head {state.head} and no layer",
            expected="both, for instance layer=5&head=2",
            fix="add the layer",
        )
    blocks = ["attn"] if state.layer.block in (None, "mlp") else [str(state.layer.block)]
    places = [Head(int(a), str(b), int(c)) for a, b, c in run.sql(_PLACES_SQL).fetchall()]
    wanted = [h for h in places if h.layer == state.layer.number and h.head == state.head and h.block in blocks]
    if wanted:
        return wanted[0]
    here = sorted({h.head for h in places if h.layer == state.layer.number and h.block in blocks})
    layers = ", ".join(dict.fromkeys(str(h.address) for h in places))
    raise InputError(
        f"run {run.name!r} has no record of head {state.head} at layer {state.layer}",
        found=f"heads {here[0]} to {here[-1]} of that layer" if here else f"heads at layers {layers or 'none'}",
        fix="choose one of these",
    )


def scores_of(run: Run, head: Head) -> list[dict[str, Any]]:
    """Every score of a head with its rank among the run's heads, by metric and condition."""
    given = {"layer": head.layer, "block": head.block, "head": head.head}
    rows: list[dict[str, Any]] = run.sql(_SCORES_SQL, given).to_arrow_table().to_pylist()
    place = {name: number for number, name in enumerate(in_order(list(dict.fromkeys(row["metric"] for row in rows))))}
    return sorted(rows, key=lambda row: place[row["metric"]])


def leading_rows(result: Result) -> list[dict[str, Any]]:
    """Heads of a map as rows of a table, the largest first."""
    rows = []
    for row in result.table.to_pylist():
        head = Head(row["layer"], row["block"], row["head"])
        group = row["group"]
        rows.append(
            {
                "id": f"{head.address}|{head.head}",
                "name": head.name,
                "rank": row["rank"],
                "value": row["value"],
                "low": _finite(row["ci_low"]),
                "high": _finite(row["ci_high"]),
                "null": _finite(row["null"]),
                "group": None if group is None or np.isnan(group) else int(group),
                "n": row["n"],
            }
        )
    return sorted(rows, key=lambda row: (row["rank"], row["id"]))


def _finite(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)
