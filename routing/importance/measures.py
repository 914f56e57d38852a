"""Measures of an expert's importance, each from the same few sums, for every router of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moescope.core.errors import InputError
from moescope.core.statistics import document_weights, quotient
from moescope.routing.importance.expert_sums import Array, ExpertSums, Gate, expert_sums, resampling_units
from moescope.routing.trace import Router, Trace
from moescope.store.run import Run

# Measure → unit; in the order in which they are shown.
UNITS: Mapping[str, str] = {
    "frequency": "tokens",
    "hotness": "× fair share",
    "ESFT token score": "share of decisions",
    "weighted frequency": "sum of weights",
    "ESFT gate score": "mean weight",
    "mean output norm": "L2 norm",
    "EAN sum": "sum of L2 norms",
    "weighted EAN sum": "sum of weight × L2 norm",
    "REAP": "mean weight × L2 norm",
    "max activation": "absolute value",
}
_REDUCTIONS = """
    SELECT layer, block, expert, tokens, output_norm_mean, weighted_norm_sum, max_abs_out
    FROM experts
    WHERE run_id = $run AND expert >= 0
"""
_ANY_NORM = "SELECT 1 FROM expert_outputs WHERE run_id = $run LIMIT 1"


@dataclass(frozen=True)
class Measured:
    """The measures of one router's experts.

    Attributes:
        router: whose experts.
        count: [expert] tokens routed to it.
        values: measure → [expert]; NaN where it is undefined (a mean over no token).
        draws: measure → [draw, expert] in resamples of documents; without the measures that have no sums by document.
        even: measure → what every expert would have if the layer's decisions were dealt out evenly; NaN for none.
    """

    router: Router
    count: Array
    values: Mapping[str, Array]
    draws: Mapping[str, Array]
    even: Mapping[str, float]


def measure(trace: Trace, *, gate: Gate, draws: int, seed: int) -> tuple[list[Measured], tuple[str, ...]]:
    """Every measure that the records allow, router by router, and notes on what is left out.

    Args:
        trace: decisions of a run.
        gate: which weights g stand for; see `slot_weights`.
        draws: resamples of documents; none for a single document.
        seed: of the resampling.
    """
    unit, units, notes = resampling_units(trace, seed=seed)
    resampled = document_weights(units, draws=draws, seed=seed).astype(np.float64) if units > 1 else None
    norms = bool(trace.run.sql(_ANY_NORM).fetchall())
    reductions = _reductions(trace.run)
    found = []
    for router in trace.routers:
        sums = expert_sums(trace, router, unit, units, gate=gate, norms=norms)
        whole = _formulas(_summed(sums, np.ones((1, units))))
        again = {} if resampled is None else _formulas(_summed(sums, resampled))
        values = {name: value[0] for name, value in whole.items()}
        even = {name: float(value.ravel()[0]) for name, value in _formulas(_evened(sums)).items()}
        reduced, reduced_even = _reduced(reductions, router, gate)
        values, even = reduced | values, reduced_even | even
        ordered = {name: values[name] for name in UNITS if name in values}
        found.append(Measured(router, sums.count.sum(0), ordered, again, even))
    return found, (*trace.notes, *notes, *_notes(trace.run, found, gate=gate, norms=norms))


def _summed(sums: ExpertSums, weights: Array) -> ExpertSums:
    """Sums over units, each taken as often as `weights` [draw, unit] says."""

    def total(part: Array | None) -> Array | None:
        return None if part is None else weights @ part

    return _each(sums, total)


def _evened(sums: ExpertSums) -> ExpertSums:
    """The layer's sums dealt out evenly over its experts."""

    def mean(part: Array | None) -> Array | None:
        return None if part is None else part.sum(0, keepdims=True).mean(1, keepdims=True)

    return _each(sums, mean)


def _each(sums: ExpertSums, change: Callable[[Array | None], Array | None]) -> ExpertSums:
    parts = ("tokens", "weighed", "count", "weight", "norm", "normed", "weighted", "both")
    changed: dict[str, Any] = {name: change(getattr(sums, name)) for name in parts}
    return replace(sums, **changed)


def _formulas(sums: ExpertSums) -> dict[str, Array]:
    """Each measure from its sums [draw, expert]; without those whose sums are not there."""
    slots = sums.tokens * sums.router.top_k
    values = {
        "frequency": sums.count,
        "hotness": quotient(sums.count * sums.router.n_experts, slots),
        "ESFT token score": quotient(sums.count, slots),
    }
    if sums.weight is not None:
        values |= {"weighted frequency": sums.weight, "ESFT gate score": quotient(sums.weight, sums.weighed)}
    if sums.norm is not None and sums.normed is not None:
        values |= {"EAN sum": sums.norm, "mean output norm": quotient(sums.norm, sums.normed)}
    if sums.weighted is not None and sums.both is not None:
        values |= {"weighted EAN sum": sums.weighted, "REAP": quotient(sums.weighted, sums.both)}
    return values


def _reductions(run: Run) -> dict[tuple[int, str], dict[str, Array]]:
    """The table `experts` by router: column → [row], with the ids in `expert`."""
    frame = run.sql(_REDUCTIONS).df()
    return {
        (int(layer), str(block)): {name: part[name].to_numpy(dtype=np.float64, na_value=np.nan) for name in part}
        for (layer, block), part in frame.drop(columns=["layer", "block"]).groupby([frame["layer"], frame["block"]])
    }


def _reduced(
    reductions: dict[tuple[int, str], dict[str, Array]], router: Router, gate: Gate
) -> tuple[dict[str, Array], dict[str, float]]:
    """What running reductions give of a router, without a division by documents: the measures, and each dealt out evenly."""
    rows = reductions.get((router.layer, router.block))
    if rows is None:
        return {}, {}
    inside = rows["expert"] < router.n_experts
    at = rows["expert"][inside].astype(int)

    def spread(values: Array, absent: float) -> Array:
        full = np.full(router.n_experts, absent)
        full[at] = values[inside]
        return full

    count, mean, products, peak = (
        spread(rows[name], np.nan) for name in ("tokens", "output_norm_mean", "weighted_norm_sum", "max_abs_out")
    )
    found: dict[str, Array] = {}
    even: dict[str, float] = {}
    if not np.isnan(peak).all():
        found["max activation"] = peak
    slots = float(np.nansum(count))
    if not np.isnan(mean).all():
        total = np.where(count > 0, mean * count, 0.0)
        found |= {"mean output norm": mean, "EAN sum": total}
        even |= {"mean output norm": float(total.sum() / slots), "EAN sum": float(total.mean())}
    if gate == "given" and not np.isnan(products).all():
        found |= {"weighted EAN sum": products, "REAP": quotient(products, count)}
        whole = float(np.nansum(products))
        even |= {"weighted EAN sum": whole / router.n_experts, "REAP": whole / slots}
    return found, even


def _notes(run: Run, found: list[Measured], *, gate: Gate, norms: bool) -> tuple[str, ...]:
    present = set().union(*(part.values for part in found))
    causes = {
        "weighted frequency": "weights were not recorded",
        "ESFT gate score": "weights were not recorded",
        "max activation": "record with --probe experts",
    }
    notes = [
        f"{name} is left out: {causes.get(name, 'record with --probe expert_outputs or experts')}."
        for name in UNITS
        if name not in present
    ]
    if not norms and "mean output norm" in present:
        notes.append(
            "Norms come from sums over the whole run, so measures made of them have no interval; "
            "--probe expert_outputs records them token by token."
        )
    partial = sorted({m.router.name for m in found if len(m.values) < len(present)})
    if partial:
        notes.append(f"Some measures are not recorded in {', '.join(partial)}.")
    unused = sum(int((m.count == 0).sum()) for m in found)
    if unused:
        notes.append(f"{unused:,} experts were never chosen: their means are undefined and left empty, not 0.")
    if gate == "softmax":
        notes.append("Weights are softmax over all logits, whatever the router's own scores are.")
    return tuple(notes)


def require(found: list[Measured], name: str, run: Run) -> None:
    """Raise `InputError` unless some router has the measure."""
    present = [other for other in UNITS if any(other in part.values for part in found)]
    if name not in present:
        raise InputError(
            f"run {run.name!r} has no records for the measure {name!r}",
            expected=f"one of {', '.join(present)}",
            fix="record with --probe routing,experts,expert_outputs",
        )
