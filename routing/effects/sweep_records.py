"""A stored sweep, read back: its interventions, their numbers, and the sums by document behind them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moescope.core.edit import Edit
from moescope.core.edit_kinds.experts import Ablate, Keep, RandomRouting, TopK, TopP
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.core.statistics import bootstrap_ratio
from moescope.store.run import Run

SweepKind = Literal["experts", "sets", "keep", "width", "random", "dose"]
Array = NDArray[np.float64]
Edits = tuple[Edit, ...]
_COLUMNS = 1024

EFFECTS_SQL = """
    SELECT effect_id::VARCHAR AS effect_id, kind, draw, intervention::VARCHAR AS intervention, metric, value, ci_low, ci_high, n
    FROM effects
    WHERE base_run_id = $run AND sweep_id = $sweep AND group_kind = 'all'
    ORDER BY effect_id, kind DESC, draw
"""

_SWEEPS_SQL = """
    SELECT sweep_id::VARCHAR AS sweep_id, arg_min(intervention, effect_id)::VARCHAR AS intervention, max(effect_id) AS latest
    FROM effects
    WHERE base_run_id = $run AND sweep_id IS NOT NULL
    GROUP BY sweep_id
    ORDER BY latest DESC
"""

_SUMS_SQL = """
    SELECT p.effect_id::VARCHAR AS effect_id, p.kind, p.draw, s.document_id, sum(p.sum) AS total, sum(p.n)::DOUBLE AS n
    FROM effect_sequences p
    JOIN sequences s ON s.run_id = $run AND s.sequence_id = p.sequence_id
    WHERE p.metric = $metric AND p.effect_id IN (SELECT effect_id FROM effects WHERE base_run_id = $run AND sweep_id = $sweep)
    GROUP BY ALL
    ORDER BY ALL
"""


@dataclass(frozen=True)
class SweepRecords:
    """A sweep in the store.

    Attributes:
        run: its base run.
        sweep_id: its id.
        frame: a row an intervention: effect_id, kind, draw, name, edits, n tokens, and for each metric its value,
            `<metric>_low` and `<metric>_high`.
    """

    run: Run
    sweep_id: str
    frame: pd.DataFrame

    def sums(self, metric: str) -> tuple[Array, Array]:
        """[document, intervention] sums of a metric and the tokens behind them, interventions in the order of `frame`; 0 where
        an intervention has none."""
        rows = self.run.sql(_SUMS_SQL, {"metric": metric, "sweep": self.sweep_id}).df()
        keys = list(
            zip(self.frame["effect_id"], self.frame["kind"], self.frame["draw"].fillna(-1).astype(int), strict=True)
        )
        column = {key: number for number, key in enumerate(keys)}
        documents, place = np.unique(rows["document_id"].to_numpy(), return_inverse=True)
        shape = len(documents), len(keys)
        totals, n = np.zeros(shape), np.zeros(shape)
        at = [
            column[key]
            for key in zip(rows["effect_id"], rows["kind"], rows["draw"].fillna(-1).astype(int), strict=True)
        ]
        totals[place, at], n[place, at] = rows["total"], rows["n"]
        return totals, n

    def has(self, metric: str) -> bool:
        """Whether any intervention of the sweep has this metric."""
        return metric in self.frame.columns


def ratios(totals: Array, n: Array, *, draws: int, seed: int) -> tuple[Array, Array, Array]:
    """`bootstrap_ratio` of many columns, some at a time: as many resamples of thousands of columns would fill the memory.

    Args:
        totals: [document, column] sums.
        n: [document, column] tokens.
        draws: resamples of documents, the same for every column.
        seed: of the resampling.

    Returns:
        estimate, lower and upper bound of each column.
    """
    parts = [
        bootstrap_ratio(totals[:, at : at + _COLUMNS], n[:, at : at + _COLUMNS], draws=draws, seed=seed)
        for at in range(0, totals.shape[1], _COLUMNS)
    ]
    value, low, high = (np.concatenate(part) for part in zip(*parts, strict=True))
    return value, low, high


def read_sweep(run: Run, kind: SweepKind, sweep: str | None) -> SweepRecords:
    """A sweep of some kind that was measured against a run.

    Args:
        run: the base run.
        kind: what was swept.
        sweep: its id, or how it begins; None for the newest.

    Raises:
        InputError: there is none.
    """
    fitting = []
    for row in run.sql(_SWEEPS_SQL).to_arrow_table().to_pylist():
        first = Intervention.from_json(row["intervention"])
        if _IS[kind](first.name or "", first.edits):
            fitting.append(str(row["sweep_id"]))
    chosen = [sweep_id for sweep_id in fitting if sweep is None or sweep_id.startswith(sweep)]
    if not chosen:
        raise InputError(
            f"there is no sweep of this kind against run {run.name!r}" + (f" with the id {sweep!r}" if sweep else ""),
            expected=", ".join(fitting) or None,
            fix=f"run one: ms.sweep(model, corpus, store, kind={_MAKES[kind]!r}), or moescope intervene sweep",
        )
    return SweepRecords(run, chosen[0], _frame(run, chosen[0]))


def _frame(run: Run, sweep_id: str) -> pd.DataFrame:
    found: dict[tuple[str, str, int | None], dict[str, Any]] = {}
    for row in run.sql(EFFECTS_SQL, {"sweep": sweep_id}).to_arrow_table().to_pylist():
        key = row["effect_id"], row["kind"], row["draw"]
        if key not in found:
            intervention = Intervention.from_json(row["intervention"])
            found[key] = {
                "effect_id": row["effect_id"],
                "kind": row["kind"],
                "draw": row["draw"],
                "name": intervention.name or "",
                "edits": intervention.edits,
                "n": row["n"],
            }
        metric = row["metric"]
        low, high = (np.nan if row[c] is None else row[c] for c in ("ci_low", "ci_high"))
        found[key] |= {metric: row["value"], f"{metric}_low": low, f"{metric}_high": high}
    frame = pd.DataFrame(list(found.values()))
    frame["draw"] = frame["draw"].astype("Int64")
    return frame


def _is_expert(edits: Edits) -> bool:
    """One expert of one layer, taken out whole."""
    if len(edits) != 1 or not isinstance(edits[0], Ablate):
        return False
    edit = edits[0]
    return len(edit.ids) == 1 and isinstance(edit.layer, int) and edit.strength == 1


def _all(edits: Edits, kind: type[Edit]) -> bool:
    return bool(edits) and all(isinstance(edit, kind) and edit.strength == 1 for edit in edits)


_IS: dict[SweepKind, Callable[[str, Edits], bool]] = {
    "experts": lambda name, edits: _is_expert(edits),
    "sets": lambda name, edits: _all(edits, Ablate) and " by " in name,
    "keep": lambda name, edits: _all(edits, Keep) and " by " in name,
    "width": lambda name, edits: _all(edits, TopK) or _all(edits, TopP),
    "random": lambda name, edits: _all(edits, RandomRouting),
    "dose": lambda name, edits: " × " in name,
}
_MAKES: dict[SweepKind, str] = {
    "experts": "experts",
    "sets": "drop",
    "keep": "keep",
    "width": "top_k",
    "random": "routing_value",
    "dose": "dose",
}
