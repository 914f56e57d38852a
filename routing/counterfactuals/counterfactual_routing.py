"""Counterfactual routing: what another rule would have decided, from the scores that were recorded."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.routing.balance.groups import By, grouped
from moescope.routing.counterfactuals.asked import THRESHOLD, Asked, RuleName, RuleSettings, asked_routers
from moescope.routing.counterfactuals.comparison import Tallies, Tally, next_nll
from moescope.routing.counterfactuals.correlation import correlation_rows
from moescope.routing.counterfactuals.rows import router_rows, size_rows, threshold_rows
from moescope.routing.grid import layer_name
from moescope.routing.trace import read_trace
from moescope.store.run import Run

# Routers are gone through side by side: reading, arrays and compiled choices let each other run.
_THREADS = 2


@analysis(
    name="counterfactual_routing",
    needs=("routing", "router_logits"),
    source="top-p arXiv 2403.07652; ratio 2402.14800; gap 2310.07188; null experts 2406.13233; expert choice 2202.09368; "
    "balanced 2103.16716; grouped 2105.15082; hash 2106.04426",
    section="counterfactuals",
    order=10,
)
def counterfactual_routing(
    run: Run,
    *,
    rule: RuleName = "top_p",
    value: float | None = None,
    tune: Literal["model", "layer"] = "model",
    by: By = "layer",
    bins: Count = 10,
    window: Count = 1024,
    windows: Count = 16,
    slots: Count | None = None,
    nulls: Count | None = None,
    any_router: bool = False,
    draws: Count = 500,
    seed: Natural = 0,
) -> Result:
    """Which experts would another routing rule have chosen, at the same number of experts a token?

    From the router's stored scores p (softmax of the logits, or scores over their sum where the router is no softmax):

    top_p: the fewest experts whose p sum to at least a threshold, the one that crosses it included; ratio: experts with p at
    least r × the token's largest; gap: experts at most T below the token's largest p (the authors decide between one and two
    experts so); null: experts above b among the top `slots` logits, as if `nulls` experts of logit b competed. The one
    threshold of these rules is set so that tokens have k experts on average: the order statistic of the scores, which a
    bisection would end at.

    expert_choice: each expert takes the tokens of a window that give it the highest p, tokens × k ÷ E of them; a token's
    experts then depend on tokens after it. balanced: each token k experts and each expert as many tokens, at the largest
    sum of logits; solved by auction to within 0.01 logits a decision, on `windows` windows of each router spread over the
    run. grouped: the best expert of each of k groups of neighbours. hash: k experts drawn at random for each token id.

    agreement is the share of recorded decisions that the rule would take too, Jaccard |A∩B| ÷ |A∪B| of the two sets averaged
    over tokens, score kept the p of the rule's experts over the p of the recorded ones. For rules with a free number of
    experts, also its correlation with the NLL of the prediction made at the token, where that was recorded.

    Routers whose decisions do not follow from the stored logits by the rule that the run names (a bias for the choice, a
    hash table, an edit) are left out, unless `any_router`; where no rule is stored, as in imported runs, the top-k of a softmax
    is assumed and a note tells how often it fails.

    Args:
        rule: the other rule.
        value: its threshold, instead of the one that gives k experts a token; for the first four rules.
        tune: one threshold for all routers (layers then differ in experts a token), or one for each.
        by: measure over all tokens of a router (layer), or apart for each label, position, phase or class of token.
        bins: equal parts of each sequence, for by="position".
        window: tokens routed together, for expert_choice and balanced.
        windows: windows of each router that are solved, for balanced.
        slots: k′ of null, from k to E; twice k where not given.
        nulls: null experts; as many as slots where not given, so that a token may have none.
        any_router: also routers whose decisions do not follow from the stored logits alone.
        draws: bootstrap resamples of documents.
        seed: of resamples, shuffles and the hash table.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> probes = ("tokens", "routing", "router_logits")
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world."], store, name="first", probes=probes, progress=False)
        ...     frame = ms.analyze(run, "counterfactual_routing", rule="grouped").df()
        ...     frame[frame.metric == "experts per token"].value.unique().tolist()
        [2.0]
    """
    if value is not None and rule not in THRESHOLD:
        raise InputError(f"{rule} has no threshold to set", expected=f"value with one of {', '.join(THRESHOLD)}")
    trace = read_trace(run)
    grouping = grouped(trace, by, bins)
    settings = RuleSettings(rule, value, tune, window, windows, slots, nulls, seed)
    routers, notes = asked_routers(trace, settings, any_router=any_router)
    if rule == "hash" and (trace.token_id < 0).any():
        raise InputError(f"run {run.name!r} has no token ids", fix="record it, or import a trace with token_id")
    nll = next_nll(trace) if rule in (*THRESHOLD, "expert_choice") else np.full(trace.tokens, np.nan)

    def tallied(asked: Asked) -> Tally:
        counting = Tallies(trace, asked.router, grouping, asked.scoring, nll, seed=seed)
        for part, logits in asked.chunks(trace, settings):
            counting.add(part, logits, asked.choose)
        return counting.done()

    with ThreadPoolExecutor(_THREADS) as pool:
        tallies = list(pool.map(tallied, routers))
    tallies = [tally for tally in tallies if tally.sums["tokens"].any()]
    if not tallies:
        raise InputError(f"no token of run {run.name!r} has logits and is in a group", fix="look at run.coverage")
    rows: list[dict[str, Any]] = []
    for tally in tallies:
        rows += router_rows(tally, grouping, draws=draws, seed=seed)
        rows += correlation_rows(tally, grouping, draws=draws, seed=seed)
    rows += threshold_rows(routers, each=tune == "layer") + size_rows(tallies, grouping)
    frame = pd.DataFrame(rows).astype({"layer": "Int64"})
    return Result(
        title=_title(frame, rule, by),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=int(sum(tally.sums["tokens"].sum() for tally in tallies)),
        n_unit="token × router pairs",
        definition=f"The rule: {_words(routers[0])}. Agreement: share of recorded decisions that it would take too. "
        "Jaccard: of the two sets, mean over tokens. Score kept: p of its experts over p of the recorded ones. "
        "Largest load: over the mean load.",
        units={
            "value": "by metric",
            "value[experts per token]": "experts",
            "value[agreement]": "share of recorded decisions",
            "value[Jaccard]": "share",
            "value[score kept]": "ratio",
            "value[largest load]": "ratio to the mean load",
            "value[tokens without an expert]": "share of tokens",
            "recorded": "the metric under the model's own decisions",
        },
        interval=grouping.interval(draws).replace("basic", "percentile"),
        null="agreement and Jaccard of a router with the same loads that does not look at the token: its decisions dealt to "
        "other tokens; correlation: 0",
        computation=_COMPUTATION.get(rule, f"decisions recomputed from stored logits by {rule.replace('_', ' ')}"),
        notes=trace.notes + notes + _rule_notes(routers, settings),
    )


_COMPUTATION = {
    "balanced": "auction over windows of stored logits, prices carried from window to window",
    **dict.fromkeys(THRESHOLD, "threshold from a sorted sample, decisions recomputed from stored logits"),
}


def _words(asked: Asked) -> str:
    rule: Any = asked.rule
    return str(rule.words)


def _rule_notes(routers: list[Asked], settings: RuleSettings) -> tuple[str, ...]:
    if settings.name == "expert_choice":
        return ("A token's experts depend on tokens after it, so a causal model could not decide like this.",)
    if settings.name == "balanced":
        rules: list[Any] = [asked.rule for asked in routers]
        reached, bound = sum(rule.reached for rule in rules), sum(rule.bound for rule in rules)
        return (f"The assignments' logits sum to {reached:,.1f}; no balanced ones could exceed {bound:,.1f}.",)
    if settings.name in THRESHOLD and settings.value is None:
        sampled = len(routers[0].sample)
        return (
            f"The threshold was set on {sampled:,} tokens of each router; the means shown are over all its tokens.",
        )
    return ()


def _mean(frame: pd.DataFrame, metric: str, column: str = "value") -> float:
    part = frame[frame["metric"] == metric]
    return float(np.average(part[column], weights=part["n"]))


def _title(frame: pd.DataFrame, rule: RuleName, by: By) -> str:
    size = frame[frame["metric"] == "experts per token"].reset_index(drop=True)
    agreement, chance = _mean(frame, "agreement"), _mean(frame, "agreement", "null")
    mean, recorded = _mean(frame, "experts per token"), _mean(frame, "experts per token", "recorded")
    named = {"top_p": "Top-p", "null": "Null-expert", "expert_choice": "Expert-choice"}.get(rule, rule.capitalize())
    first = (
        f"{named} routing would keep {agreement:.1%} of decisions (chance {chance:.1%}) with {mean:.2f} experts a token"
    )
    first += f" (recorded: {recorded:.3g})"
    low, high = size.loc[size["value"].idxmin()], size.loc[size["value"].idxmax()]
    if high["value"] - low["value"] < 0.05:
        return first
    ends = [layer_name(int(row["layer"]), str(row["block"])) for row in (low, high)]
    if by != "layer":
        ends = [f"{name} · {row[by]}" for name, row in zip(ends, (low, high), strict=True)]
    return f"{first}: from {low['value']:.2f} in {ends[0]} to {high['value']:.2f} in {ends[1]}"


def _draw(result: Result) -> go.Figure:
    from moescope.routing.counterfactuals.counterfactual_figure import draw

    return draw(result)
