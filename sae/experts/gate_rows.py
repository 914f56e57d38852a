"""Rows of what latents do to routers behind them, with interval and null."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moescope.core.statistics import permutation_p
from moescope.sae.experts.intervals import with_interval
from moescope.sae.experts.pair_rows import Rows, Setting, kept_pairs
from moescope.sae.experts.passes import PairSums, Sums
from moescope.sae.experts.subject import Router

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
NULL_KIND = "mean size with latents of nearest frequency"
LIFT_NULL_KIND = "mean with latents of nearest frequency"


def difference(active_sum: Floats, everywhere: Floats, active: Floats, rows: Floats) -> Floats:
    """Mean over active tokens less mean over the others."""
    found: Floats = active_sum / active - (everywhere - active_sum) / (rows - active)
    return found


def lift(together: Floats, chosen: Floats, active: Floats, rows: Floats) -> Floats:
    """P(chosen | active) ÷ P(chosen)."""
    found: Floats = (together / active) / (chosen / rows)
    return found


def measured(sums: Sums, at: Router) -> tuple[Floats, Floats]:
    """[choice, feature] `gates_logit` and `gates_lift` over all tokens."""
    tally, rows = sums.gates[at], np.array(float(sums.rows))
    logits, chosen = tally.logits.cpu().numpy().T, tally.chosen.cpu().numpy().T
    all_logits, all_chosen = (t.cpu().numpy()[:, None] for t in (tally.all_logits, tally.all_chosen))
    with np.errstate(divide="ignore", invalid="ignore"):
        return (
            difference(logits, all_logits, sums.active[None], rows),
            lift(chosen, all_chosen, sums.active[None], rows),
        )


def by_weights(setting: Setting, at: Router) -> Floats | None:
    """[choice, feature] `gates_weights`; None where the router is no linear map of the stream."""
    rows = setting.sums.gates[at].weights()
    if rows is None:
        return None
    decoder = setting.subject.directions * setting.subject.norms[:, None]
    found: Floats = (rows @ decoder.double().T).cpu().numpy()
    return found


def gate_pairs(sums: Sums, at: Router, alive: Ints, top: int, strongest: int) -> PairSums:
    """The pairs of a router that are kept, by `gates_logit`."""
    return PairSums(*kept_pairs(measured(sums, at)[0], alive, top, strongest))


def gate_rows(rows: Rows, setting: Setting, at: Router) -> str | None:
    """Add every metric of a router's kept pairs; gives a note where weights alone tell nothing."""
    pairs = setting.groups.gates[at]
    weights = by_weights(setting, at)
    note = (
        None
        if weights is not None
        else f"The router of layer {at[0]} is no linear map of a norm of the stream: no `gates_weights`."
    )
    if not len(pairs.feature):
        return note
    assert pairs.logits is not None
    assert pairs.lifts is not None
    assert pairs.all_logits is not None
    assert pairs.all_chosen is not None
    active, whole = setting.active(pairs.feature), setting.groups.rows[:, None]
    n, options = active.sum(0), {"draws": setting.draws, "seed": setting.seed}
    moved = with_interval(difference, [pairs.logits, pairs.all_logits[:, pairs.expert], active, whole], **options)
    lifted = with_interval(lift, [pairs.lifts, pairs.all_chosen[:, pairs.expert], active, whole], **options)
    logit, lifts = measured(setting.sums, at)
    other = setting.alive[setting.neighbours()[np.searchsorted(setting.alive, pairs.feature)]]
    drawn = np.abs(logit[pairs.expert[:, None], other])
    some = bool(drawn.shape[1])

    def add(
        metric: str, unit: str, value: Floats, null: Floats, kind: str, bounds: tuple[Floats, Floats] | None
    ) -> None:
        low, high = bounds or (None, None)
        rows.add(
            at, metric, unit, pairs.feature, pairs.expert, value, n=n, low=low, high=high,
            null=null.mean(1) if some else None, null_kind=kind if some else None,
        )  # fmt: skip

    add("gates_logit", "logits", moved[0], drawn, NULL_KIND, moved[1:])
    if some:
        p = permutation_p(np.abs(moved[0]), drawn.T).astype(np.float64)
        rows.add(at, "gates_logit_p", "p", pairs.feature, pairs.expert, p, n=n, null_kind=NULL_KIND)
    add("gates_lift", "ratio", lifted[0], lifts[pairs.expert[:, None], other], LIFT_NULL_KIND, lifted[1:])
    if weights is not None:
        near = np.abs(weights[pairs.expert[:, None], other])
        add(
            "gates_weights",
            "logits per unit of activation",
            weights[pairs.expert, pairs.feature],
            near,
            NULL_KIND,
            None,
        )
    return note
