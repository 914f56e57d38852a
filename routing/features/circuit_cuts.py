"""What a task loses without the heads of a circuit, and keeps with them alone, beside random heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moescope.core.statistics import bootstrap_ratio
from moescope.store.run import Run

Floats = NDArray[np.float64]
CUT, KEEP = "circuit at its mean", "all other heads at their mean"
_CUTS_SQL = """
    SELECT
        e.effect_id::VARCHAR AS effect,
        e.intervention->>'$.name' AS name,
        e.kind, e.draw, e.metric, s.sequence_id, s.sum
    FROM effects e
    JOIN effect_sequences s
        ON s.effect_id = e.effect_id AND s.kind = e.kind AND s.draw IS NOT DISTINCT FROM e.draw AND s.metric = e.metric
    WHERE e.base_run_id = ? AND e.group_kind = 'all' AND ends_with(e.metric, 'logit_difference')
    ORDER BY effect, e.kind DESC, e.draw, e.metric, s.sequence_id
"""


@dataclass(frozen=True)
class _Cuts:
    """[prompt] logit differences: as it is, with all heads at their mean; of the circuit and random sets, cut and kept."""

    base: Floats
    everything: Floats | None
    cut: Floats
    kept: Floats
    random_cut: Floats
    random_kept: Floats


def logit_differences(run: Run, *, draws: int, seed: int) -> pd.DataFrame | None:
    """Logit differences of the newest two cuts of a circuit, with intervals and random sets; None where there are none.

    Columns: metric, condition, value, ci_low, ci_high, null, null_low, null_high, n. `lost` and `recovered` are there only where all
    heads at their mean lower the difference beyond doubt.
    """
    cuts = _cuts(run)
    return None if cuts is None else _differences(cuts, draws, seed)


def _cuts(run: Run) -> _Cuts | None:
    """The newest two effects of the circuit; None where there are none."""
    rows = pd.DataFrame(
        run.store.fetch(_CUTS_SQL, [run.run_id]),
        columns=["effect", "name", "kind", "draw", "metric", "sequence_id", "sum"],
    )
    targets = rows[rows["kind"] == "target"]
    newest = {name: part["effect"].max() for name, part in targets.groupby("name")}
    if CUT not in newest or KEEP not in newest:
        return None
    found: dict[str, Any] = {}
    for name, (one, random) in {CUT: ("cut", "random_cut"), KEEP: ("kept", "random_kept")}.items():
        part = rows[rows["effect"] == newest[name]]
        own = {
            metric: p.sort_values("sequence_id")["sum"].to_numpy()
            for metric, p in part[part["kind"] == "target"].groupby("metric")
        }
        base = own["base_logit_difference"]
        found |= {
            "base": base,
            "everything": own.get("all_at_mean_logit_difference"),
            one: base + own["delta_logit_difference"],
        }
        controls = part[(part["kind"] == "control") & (part["metric"] == "delta_logit_difference")]
        each = [base + p.sort_values("sequence_id")["sum"].to_numpy() for _, p in controls.groupby("draw")]
        found[random] = np.stack(each) if each else np.zeros((0, len(base)))
    return _Cuts(**found)


def _differences(cuts: _Cuts, draws: int, seed: int) -> pd.DataFrame:
    """Logit differences under each condition, and shares lost and recovered."""
    one = np.ones_like(cuts.base)
    rows = [_row("logit difference", "base", cuts.base, one, None, draws, seed)]
    if cuts.everything is not None:
        rows.append(_row("logit difference", "all heads at their mean", cuts.everything, one, None, draws, seed))
    for name, value, random in ((CUT, cuts.cut, cuts.random_cut), (KEEP, cuts.kept, cuts.random_kept)):
        rows.append(_row("logit difference", name, value, one, [(r, one) for r in random], draws, seed))
    if len(cuts.random_cut):
        fallen = cuts.random_cut.mean(0) - cuts.cut
        rows.append(_row("logit difference", "random heads less the circuit", fallen, one, None, draws, seed))
    if cuts.everything is not None and _heads_matter(cuts, draws, seed):
        whole = cuts.base - cuts.everything
        lost = [(cuts.base - r, whole) for r in cuts.random_cut]
        kept = [(r - cuts.everything, whole) for r in cuts.random_kept]
        rows.append(_row("lost", CUT, cuts.base - cuts.cut, whole, lost, draws, seed))
        rows.append(_row("recovered", KEEP, cuts.kept - cuts.everything, whole, kept, draws, seed))
    return pd.DataFrame(rows)


def _heads_matter(cuts: _Cuts, draws: int, seed: int) -> bool:
    """Whether all heads at their mean lower the difference, so that shares of what goes have a meaning."""
    assert cuts.everything is not None
    _, low, _ = bootstrap_ratio(cuts.base - cuts.everything, np.ones_like(cuts.base), draws=draws, seed=seed)
    return bool(low > 0)


def _row(
    metric: str,
    condition: str,
    above: Floats,
    below: Floats,
    controls: Sequence[tuple[Floats, Floats]] | None,
    draws: int,
    seed: int,
) -> dict[str, Any]:
    value, low, high = (float(v) for v in bootstrap_ratio(above, below, draws=draws, seed=seed))
    found: dict[str, Any] = {
        "metric": metric,
        "condition": condition,
        "value": value,
        "ci_low": low,
        "ci_high": high,
        "n": len(above),
    }
    if controls:
        each = [float(a.sum() / b.sum()) if b.sum() else np.nan for a, b in controls]
        found |= {"null": float(np.mean(each)), "null_low": min(each), "null_high": max(each)}
    return found
