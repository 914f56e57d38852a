"""How a measure of experts is read: from one analysis, from the running reductions, or as the strongest of several groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from moescope.core.analysis import analyses
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.routing.grid import layer_name
from moescope.routing.phenomena.expert_outputs import expert_outputs
from moescope.routing.phenomena.super_expert_rules import RULES, judge
from moescope.routing.specialization.expert_pairs import count_router
from moescope.routing.trace import read_trace
from moescope.store.run import Run

KEY = ["layer", "block", "expert"]
# A ratio of a handful of tokens says little.
FEWEST = 30
_REDUCTIONS = """
    SELECT
        l.layer,
        l.block,
        l.expert,
        l.tokens AS n,
        l.weight_sum / nullif(l.tokens, 0) AS weight,
        e.output_norm_mean AS output_norm,
        e.weighted_norm_sum / nullif(e.tokens, 0) AS weighted_norm
    FROM (
        SELECT layer, block, expert, sum(tokens)::BIGINT AS tokens, sum(weight_sum) AS weight_sum
        FROM loads
        WHERE run_id = $run AND expert >= 0
        GROUP BY layer, block, expert
    ) l
    LEFT JOIN experts e ON e.run_id = $run AND e.layer = l.layer AND e.block = l.block AND e.expert = l.expert
    ORDER BY l.layer, l.block, l.expert
"""


@dataclass(frozen=True)
class Reading:
    """One number an expert.

    Attributes:
        frame: layer, block, expert, value, and where they apply ci_low, ci_high, null, n, amount (what the layer's Gini
            coefficient is of, where not the value) and detail (text: which label, partner or latent it is about).
        n, n_unit: what stands behind all of it.
        interval, null: what the bounds and the chance level are.
        sql, parameters: the query it comes from.
        computation: what was computed besides.
        absent: why an expert that was chosen may have no value, where `detail` does not say it.
        notes: what was left out.
    """

    frame: pd.DataFrame
    n: int
    n_unit: str
    interval: str | None = None
    null: str | None = None
    sql: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    computation: str = ""
    absent: str = "not recorded"
    notes: tuple[str, ...] = ()


Read = Callable[[Run, str | None], Reading]
"""Reads a measure of a run; the text is the label asked for, where the measure is about one."""


def asked(run: Run, analysis: str, **given: Any) -> Result:
    """The answer of another analysis, incomplete runs included: the caller has said so by then."""
    return analyses[analysis]([run], given, allow_incomplete=True)


def of_analysis(
    analysis: str, metric: str | None = None, *, amount: str | None = None, absent: str = "not recorded", **given: Any
) -> Read:
    """The rows that an analysis has for experts, of one metric."""

    def read(run: Run, _label: str | None) -> Reading:
        result = asked(run, analysis, **given)
        frame = result.df()
        if metric is not None:
            frame = frame[frame["metric"] == metric]
        frame = frame[frame["expert"].notna()]
        if not frame["value"].notna().any():
            raise InputError(
                f"run {run.name!r} has no {metric or 'value'} of any expert", fix=f"see the analysis {analysis}"
            )
        if amount is not None:
            frame = frame.assign(amount=frame[amount])
        if "n" not in frame and "tokens" in frame:
            frame = frame.assign(n=frame["tokens"])
        return _reading(result, frame, absent=absent)

    return read


def reductions(column: str) -> Read:
    """A mean over the tokens of each expert, from `loads` and `experts`."""

    def read(run: Run, _label: str | None) -> Reading:
        frame = run.sql(_REDUCTIONS).df()
        if not frame[column].notna().any():
            raise InputError(
                f"run {run.name!r} has no {column.replace('_', ' ')} of any expert",
                fix="record from a live model, with the probe experts",
            )
        frame = frame.assign(value=frame[column])
        return Reading(frame, int(frame["n"].sum()), "decisions", sql=_REDUCTIONS, parameters={"run": run.run_id})

    return read


def strongest(analysis: str, group: str, ratio: str) -> Read:
    """log2 of an expert's largest ratio over groups, and which group that is; of one group where a label is asked for."""

    def read(run: Run, label: str | None) -> Reading:
        result = asked(run, analysis)
        frame = result.df()
        if label is not None and group == "label":
            known = sorted(frame[group].unique())
            if label not in known:
                raise InputError(f"run {run.name!r} has no label {label!r}", expected="one of " + ", ".join(known))
            frame = frame[frame[group] == label]
        with np.errstate(divide="ignore", invalid="ignore"):
            frame = frame.assign(log=np.log2(frame[ratio].where(frame["value"] > 0)))
        frame = frame.sort_values("log", ascending=False, na_position="last", kind="stable").drop_duplicates(KEY)
        detail = [f"{name} (q = {q:.2g})" for name, q in zip(frame[group], frame["q"], strict=True)]
        frame = frame[[*KEY, "n"]].assign(value=frame["log"], amount=frame[ratio], detail=detail)
        return _reading(result, frame, absent="takes none of their tokens")

    return read


def partner(run: Run, _label: str | None) -> Reading:
    """log2 of the largest co-activation over chance among an expert's pairs, and with which expert."""
    trace = read_trace(run)
    frames = []
    for router in trace.routers:
        found = count_router(router, "all")
        ratio = np.where(found.together >= FEWEST, found.over_chance, np.nan)
        np.fill_diagonal(ratio, np.nan)
        best = np.argmax(np.nan_to_num(ratio, nan=-1.0), axis=1)
        value = ratio[np.arange(len(best)), best]
        frames.append(
            pd.DataFrame(
                {
                    "layer": router.layer,
                    "block": router.block,
                    "expert": np.arange(router.n_experts),
                    "value": np.log2(np.where(value > 0, value, np.nan)),
                    "amount": value,
                    "n": found.tokens,
                    "detail": [
                        f"with E{other}" if known else None
                        for other, known in zip(best, np.isfinite(value), strict=True)
                    ],
                }
            )
        )
    return Reading(
        pd.concat(frames, ignore_index=True),
        trace.tokens,
        "tokens",
        null="0: as often as k different experts drawn by load alone",
        computation="pairs counted token by token, as in the analysis coactivation",
        absent=f"no pair of {FEWEST} tokens",
        notes=(*trace.notes, f"Pairs of fewer than {FEWEST} tokens are left out."),
    )


def rule(name: str) -> Read:
    """An expert's largest |output| over the threshold of a rule for super experts, in the layers the rule looks at."""

    def read(run: Run, _label: str | None) -> Reading:
        asked(run, "super_experts", contexts=0)
        outputs = expert_outputs(run)
        ruled = judge(outputs, name, percentile=99.5, fraction=0.1, share=0.75)
        if ruled is None or ruled.threshold <= 0:
            raise InputError(
                f"the rule {name!r} has no layer of run {run.name!r} to look at",
                expected=RULES[name],
                fix="record the residual stream too (probe residual), or choose another rule",
            )
        frame = outputs.frame[outputs.frame["expert"] >= 0].copy()
        inside = frame["layer"].isin(ruled.layers)
        chosen = ruled.chosen[outputs.frame["expert"].to_numpy() >= 0]
        frame["detail"] = np.where(chosen, "super expert", np.where(inside, "", "layer not looked at"))
        frame["value"] = (frame["value"] / ruled.threshold).where(inside)
        places = ", ".join(layer_name(layer) for layer in ruled.layers)
        note = f"The rule looks at {places}; the threshold is {ruled.threshold:.4g}."
        return Reading(frame, len(frame), "experts", notes=(note, *outputs.notes), computation="analysis super_experts")

    return read


def _reading(result: Result, frame: pd.DataFrame, *, absent: str) -> Reading:
    kept = [c for c in (*KEY, "value", "ci_low", "ci_high", "null", "n", "amount", "detail") if c in frame]
    return Reading(
        frame[kept],
        result.n,
        result.n_unit,
        interval=result.interval if "ci_low" in kept else None,
        null=result.null if "null" in kept else None,
        sql=result.sql,
        parameters=result.sql_parameters,
        computation=f"analysis {result.name}",
        absent=absent,
        notes=result.notes,
    )
