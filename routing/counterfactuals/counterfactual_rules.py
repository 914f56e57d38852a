"""All counterfactual rules side by side, on the same tokens, at the same number of experts a token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.figures import CHANCE, SERIES
from moescope.core.result import Result
from moescope.routing.balance.groups import Grouping, grouped
from moescope.routing.balance.router_scores import Floats32, logit_chunks
from moescope.routing.counterfactuals.asked import (
    SAMPLED_SCORES,
    Asked,
    RuleName,
    RuleSettings,
    followed_routers,
    window_starts,
    with_rule,
)
from moescope.routing.counterfactuals.comparison import Tallies, Tally
from moescope.routing.counterfactuals.rows import largest_load, ratio_rows
from moescope.routing.trace import Trace, read_trace
from moescope.store.run import Run

Chunk = tuple[NDArray[np.int64], Floats32]


@analysis(
    name="counterfactual_rules",
    needs=("routing", "router_logits"),
    source="top-p arXiv 2403.07652; ratio 2402.14800; gap 2310.07188; null experts 2406.13233; expert choice 2202.09368; "
    "balanced 2103.16716; grouped 2105.15082; hash 2106.04426",
    section="counterfactuals",
    order=9,
)
def counterfactual_rules(
    run: Run,
    *,
    window: Count = 1024,
    windows: Count = 4,
    any_router: bool = False,
    draws: Count = 500,
    seed: Natural = 0,
) -> Result:
    """Which other routing rule comes closest to the model's own decisions at the same number of experts a token?

    Every rule of `counterfactual_routing`, on the same windows of consecutive tokens, spread over the run; thresholds are set
    on these windows, for all routers together, so that tokens have k experts on average. Agreement is the share of recorded decisions that
    the rule would take too, score kept the probability of its experts over that of the recorded ones, largest load that of the
    busiest expert over the mean, averaged over routers.

    Args:
        window: tokens of a window; expert choice and balanced assignment route a window at once.
        windows: windows of each router.
        any_router: also routers whose decisions do not follow from the stored logits alone.
        draws: bootstrap resamples of documents.
        seed: of resamples, shuffles and the hash table.
    """
    trace = read_trace(run)
    grouping = grouped(trace, "layer", 1)
    found, notes = followed_routers(trace, any_router=any_router)
    names: list[RuleName] = [name for name in get_args(RuleName) if name != "hash" or (trace.token_id >= 0).all()]
    if "hash" not in names:
        notes += ("Some tokens have no id, so hash is left out.",)
    starts = window_starts(trace, window, windows)
    chunks = [list(logit_chunks(trace, asked.router, chunk=window, starts=starts)) for asked in found]
    found = _tuned_on(found, chunks)
    rules = {name: with_rule(found, _settings(name, window, windows, seed)) for name in names}
    tallies = {
        name: [
            _tally(trace, grouping, asked, part, seed=seed) for asked, part in zip(routers, chunks, strict=True) if part
        ]
        for name, routers in rules.items()
    }
    if not any(chunks):
        raise InputError(f"no token of these windows of run {run.name!r} has logits", fix="raise windows")
    rows = [row for name in names for row in _rows(name, tallies[name], draws=draws, seed=seed)]
    frame = pd.DataFrame(rows)
    return Result(
        title=_title(frame),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=int(frame[frame["metric"] == "agreement"]["n"].max()),
        n_unit="token × router pairs",
        definition="Agreement: share of recorded decisions that the rule would take too. Jaccard: of the two sets, mean "
        "over tokens. Score kept: probability of its experts over that of the recorded ones. Largest load: busiest expert "
        "over the mean, mean over routers.",
        units={
            "value": "by metric",
            "value[experts per token]": "experts",
            "value[agreement]": "share of recorded decisions",
            "value[score kept]": "ratio",
            "value[largest load]": "ratio to the mean load",
            "recorded": "the metric under the model's own decisions",
        },
        interval=grouping.interval(draws).replace("basic", "percentile"),
        null="agreement and Jaccard of a router with the same loads that does not look at the token",
        computation=f"decisions recomputed from stored logits, {windows} windows of {window:,} tokens a router",
        notes=trace.notes + notes,
    )


def _settings(name: RuleName, window: int, windows: int, seed: int) -> RuleSettings:
    return RuleSettings(name, None, "model", window, windows, None, None, seed)


def _tuned_on(found: list[Asked], chunks: list[list[Chunk]]) -> list[Asked]:
    """The same routers, with their windows as the sample that thresholds are set on; thinned where it is very large."""
    scores = sum(logits.size for part in chunks for _, logits in part)
    step = -(-scores // SAMPLED_SCORES) or 1
    return [
        replace(asked, sample=np.concatenate([logits for _, logits in part])[::step]) if part else asked
        for asked, part in zip(found, chunks, strict=True)
    ]


def _tally(trace: Trace, grouping: Grouping, asked: Asked, chunks: list[Chunk], *, seed: int) -> Tally:
    counting = Tallies(trace, asked.router, grouping, asked.scoring, np.full(trace.tokens, np.nan), seed=seed)
    for rows, logits in chunks:
        counting.add(rows, logits, asked.choose)
    return counting.done()


def _rows(name: RuleName, tallies: list[Tally], *, draws: int, seed: int) -> list[dict[str, Any]]:
    sums = {field: np.sum([tally.sums[field] for tally in tallies], axis=0) for field in tallies[0].sums}
    slots = np.sum([tally.sums["tokens"] * tally.router.top_k for tally in tallies], axis=0)
    met = sum(float((tally.loads * tally.recorded).sum() / tally.sums["tokens"].sum()) for tally in tallies)
    tokens = sums["tokens"].sum()
    nulls = {"agreement": met / float(slots.sum()), "Jaccard": float(sums["jaccard_shuffled"].sum() / tokens)}
    rows: list[dict[str, Any]] = [
        {"rule": name} | row | {"null": nulls.get(row["metric"], np.nan), "n": int(tokens)}
        for row in ratio_rows(sums, slots, draws=draws, seed=seed)
    ]
    largest, before = (
        float(np.mean([largest_load(loads[0]) for loads in each]))
        for each in ([tally.loads for tally in tallies], [tally.recorded for tally in tallies])
    )
    rows.append({"rule": name, "metric": "largest load", "value": largest, "recorded": before, "n": int(tokens)})
    return rows


_NAMES = {"top_p": "top-p", "null": "null experts", "expert_choice": "expert choice"}


def _named(rules: pd.Series) -> pd.Series:
    return rules.map(lambda rule: _NAMES.get(rule, rule))


def _title(frame: pd.DataFrame) -> str:
    agreement = frame[frame["metric"] == "agreement"].sort_values("value", ascending=False)
    agreement = agreement.assign(rule=_named(agreement["rule"]))
    size = frame[frame["metric"] == "experts per token"]["recorded"].iloc[0]
    best, worst = agreement.iloc[0], agreement.iloc[-1]
    return (
        f"At {size:.3g} experts a token, {best['rule']} would keep most of the model's decisions: "
        f"{best['value']:.1%} "
        f"(chance {best['null']:.1%}); {worst['rule']} fewest, {worst['value']:.1%} (chance {worst['null']:.1%})"
    )


def _draw(result: Result) -> go.Figure:
    from plotly.subplots import make_subplots

    frame = result.df().assign(rule=lambda found: _named(found["rule"]))
    order = frame[frame["metric"] == "agreement"].sort_values("value")["rule"].tolist()
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, horizontal_spacing=0.06, column_widths=[0.6, 0.4])
    for number, (metric, unit, other, name) in enumerate(
        (
            ("agreement", "share of recorded decisions", "null", "by chance"),
            ("largest load", "ratio to the mean load", "recorded", "recorded decisions"),
        )
    ):
        part = frame[frame["metric"] == metric].set_index("rule").loc[order]
        place = {"row": 1, "col": number + 1}
        spread = {"type": "data", "symmetric": False, "thickness": 1}
        spread |= {"array": part["ci_high"] - part["value"], "arrayminus": part["value"] - part["ci_low"]}
        figure.add_bar(
            x=part["value"],
            y=order,
            orientation="h",
            marker={"color": SERIES[0]},
            error_x=spread if part["ci_high"].notna().any() else None,
            showlegend=False,
            hovertemplate="%{y}: %{x:.4g}<extra></extra>",
            **place,
        )
        figure.add_scatter(
            x=part[other],
            y=order,
            mode="markers",
            marker={
                "symbol": "line-ns",
                "size": 22,
                "line": {"width": 3, "color": CHANCE if not number else SERIES[1]},
            },
            name=name,
            hovertemplate="%{y}: %{x:.4g} " + name + "<extra></extra>",
            **place,
        )
        figure.update_xaxes(title=f"{metric} ({unit})", rangemode="tozero", **place)
    figure.update_yaxes(title="rule", type="category", row=1, col=1)
    figure.update_layout(height=480)
    return figure
