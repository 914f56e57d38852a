"""Balance: how evenly each router spreads its tokens, against what a random balanced router would give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.routing.balance.groups import By, Grouping, basic_interval, grouped, resampled_sums
from moescope.routing.balance.measures import MEASURES, batch_loads, chance_levels, load_measures
from moescope.routing.balance.panels import group_column, group_grid, panels
from moescope.routing.grid import layer_name
from moescope.routing.trace import Router, read_trace
from moescope.store.run import Run

_PANELS = {
    "CV": "std ÷ mean",
    "MaxVio": "max ÷ mean − 1",
    "normalised entropy": "÷ ln E",
    "dead experts": "share of experts",
}


@analysis(
    name="balance",
    needs=("routing",),
    source="CV: arXiv 1701.06538; MaxVio: arXiv 2408.15664; dead experts: arXiv 2101.03961; Jain, Chiu & Hawe 1984",
    section="experts",
    order=11,
)
def balance(
    run: Run,
    *,
    by: By = "layer",
    bins: Count = 10,
    batch: Count = 4096,
    starved: float = 0.1,
    null_draws: Count = 200,
    draws: Count = 500,
    seed: Natural = 0,
) -> Result:
    """Is routing balanced, or does it collapse onto few experts, beyond what chance gives?

    From the load of each expert (decisions that name it; null experts count) over tokens of a router: CV (standard deviation,
    ddof = 0, ÷ mean), max ÷ mean, MaxVio (max ÷ mean − 1), entropy of the shares ÷ ln E, effective experts (exp of that
    entropy), Jain's index (Σx)² ÷ (E Σx²), experts used, dead experts (never chosen) and starved experts (below `starved` of
    the fair share). MaxVio is the global one, over all tokens; MaxVio of a batch (by="layer") is the mean over batches of
    `batch` tokens in the order of the run, which chance alone makes larger.

    The chance level is the mean over simulated routers that choose as many experts at random for each of as many tokens, with
    no preference (`null_low`, `null_high`: its middle 95 %). Its squared CV is (E − k) ÷ (k × tokens) on average. Text
    repeats itself, so loads of a router without preference between texts may still lie above this level.

    Args:
        by: measure over all tokens of a router (layer), or apart for each label, position in the sequence, phase or
            class of token.
        bins: equal parts of each sequence, for by="position".
        batch: tokens of a batch.
        starved: an expert below this part of its fair share counts as starved.
        null_draws: simulated random routers.
        draws: bootstrap resamples of documents.
        seed: of both.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world."], store, name="first", progress=False)
        ...     sorted(set(ms.analyze(run, "balance").df().metric))[:2]
        ['CV', "Jain's index"]
    """
    if not 0 <= starved <= 1:
        raise InputError(f"starved = {starved} is no part of the fair share", expected="a number from 0 to 1")
    trace = read_trace(run)
    grouping = grouped(trace, by, bins)
    rows: list[dict[str, Any]] = []
    for router in trace.routers:
        rows += _router_rows(router, grouping, starved=starved, null_draws=null_draws, draws=draws, seed=seed)
        if by == "layer":
            rows.append(_batch_row(router, batch, starved=starved, null_draws=null_draws, seed=seed))
    frame = pd.DataFrame(rows)
    return Result(
        title=_title(frame, by),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=int(sum(r.top_k * (grouping.cell >= 0).sum() for r in trace.routers)),
        n_unit="decisions",
        definition="Unevenness of experts' loads (decisions that name them) within each router. CV: standard deviation ÷ mean. "
        "MaxVio: largest load ÷ mean load − 1, from 0 to E/k − 1. Entropy of load shares over ln E, and its exponential, "
        "the effective number of experts. Jain's index: (Σx)² ÷ (E Σx²). Dead experts are never chosen; starved ones get "
        f"less than {starved:g} of the fair share.",
        units={"value": "by metric", "null": "by metric"}
        | {f"value[{name}]": unit for name, (unit, _, _) in MEASURES.items()},
        interval=grouping.interval(draws) + "; none for batches",
        null="the same measure for a router that picks k experts at random for every token: "
        f"mean of {null_draws} simulations, null_low and null_high their middle 95 %",
        computation="loads counted by document; measures of their sums; simulated random routers",
        notes=trace.notes,
    )


def _router_rows(
    router: Router, grouping: Grouping, *, starved: float, null_draws: int, draws: int, seed: int
) -> list[dict[str, Any]]:
    counts = grouping.counts(router.experts, router.n_experts)
    rows = []
    for name, cells in grouping.cells():
        here = counts[cells]
        tokens = int(grouping.tokens[cells].sum())
        found = load_measures(here.sum(0), starved=starved)
        again = resampled_sums(here, draws=draws, seed=seed)
        resampled = None if again is None else load_measures(again, starved=starved)
        chance = chance_levels(tokens, router.n_experts, router.top_k, starved=starved, draws=null_draws, seed=seed)
        for metric, value in found.items():
            _, low, high = MEASURES[metric]
            bounds = (np.nan, np.nan)
            if resampled is not None:
                bounds = basic_interval(value, resampled[metric], low=low, high=min(high, router.n_experts))
            place = {"layer": router.layer, "block": router.block}
            place |= {grouping.column: name} if grouping.column else {}
            rows.append(
                place
                | {
                    "metric": metric,
                    "value": float(value),
                    "ci_low": float(bounds[0]),
                    "ci_high": float(bounds[1]),
                    "null": chance[metric][0],
                    "null_low": chance[metric][1],
                    "null_high": chance[metric][2],
                    "n_experts": router.n_experts,
                    "top_k": router.top_k,
                    "n": tokens,
                }
            )
    return rows


def _batch_row(router: Router, batch: int, *, starved: float, null_draws: int, seed: int) -> dict[str, Any]:
    loads = batch_loads(router.experts, router.n_experts, batch)
    size = min(batch, len(router.experts))
    chance = chance_levels(size, router.n_experts, router.top_k, starved=starved, draws=null_draws, seed=seed)
    return {
        "layer": router.layer,
        "block": router.block,
        "metric": "MaxVio of a batch",
        "value": float(load_measures(loads)["MaxVio"].mean()),
        "null": chance["MaxVio"][0],
        "null_low": chance["MaxVio"][1],
        "null_high": chance["MaxVio"][2],
        "n_experts": router.n_experts,
        "top_k": router.top_k,
        "n": len(loads) * size,
    }


def _title(frame: pd.DataFrame, by: By) -> str:
    cv = frame[frame["metric"] == "CV"].reset_index(drop=True)
    dead = frame[frame["metric"] == "dead experts"].reset_index(drop=True)
    over = int((cv["value"] > cv["null_high"]).sum())
    worst = cv.loc[cv["value"].idxmax()]
    place = layer_name(worst["layer"], worst["block"])
    where = place if by == "layer" else f"{place} · {worst[by]}"
    what = "routers" if by == "layer" else f"pairs of router and {by}"
    if not over:
        return (
            f"Routing is balanced: none of {len(cv)} {what} is less even than a random router by chance "
            f"(mean CV {cv['value'].mean():.3g}, chance {cv['null'].mean():.3g})"
        )
    lost = round(float((dead["value"] * dead["n_experts"]).sum()))
    experts = int(dead["n_experts"].sum())
    ending = "no expert is dead" if not lost else f"{lost:,} of {experts:,} experts are dead"
    if by != "layer":
        ending = (
            "no expert is dead in any" if not lost else f"{_percent(lost / experts)} of experts are dead within them"
        )
    return (
        f"{over} of {len(cv)} {what} are less even than chance: CV {cv['value'].mean():.3g} on average against "
        f"{cv['null'].mean():.3g} by chance, {worst['value']:.3g} in {where}; {ending}"
    )


def _percent(share: float) -> str:
    return "<0.1%" if 0 < share < 0.001 else f"{share:.1%}"


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    if group_column(frame) is None:
        return panels(frame, _PANELS, null_name="random balanced router")
    cv = frame[frame["metric"] == "CV"]
    value, chance = cv["value"].to_numpy(), cv["null"].to_numpy()
    ratio = np.divide(value, chance, out=np.full(len(cv), np.nan), where=chance > 0)
    return group_grid(cv, np.log2(np.maximum(ratio, 2.0**-10)), colorbar="log2 (CV ÷ CV by chance)")
