"""The rows of a counterfactual's table, from its sums."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.statistics import bootstrap_ratio
from moescope.routing.balance.groups import Grouping
from moescope.routing.counterfactuals.asked import Asked
from moescope.routing.counterfactuals.comparison import Tally

Floats = NDArray[np.float64]


def router_rows(tally: Tally, grouping: Grouping, *, draws: int, seed: int) -> list[dict[str, Any]]:
    """Every measure of one router, in each group."""
    rows = []
    for number, (name, cells) in enumerate(grouping.cells()):
        sums = {field: values[cells] for field, values in tally.sums.items()}
        tokens = sums["tokens"].sum()
        if not tokens:
            continue
        router, load = tally.router, tally.loads[number]
        place = {"layer": router.layer, "block": router.block}
        place |= {grouping.column: name} if grouping.column else {}
        met = float(load @ tally.recorded[number]) / tokens
        nulls = {"agreement": met / (tokens * router.top_k), "Jaccard": sums["jaccard_shuffled"].sum() / tokens}
        for row in ratio_rows(sums, sums["tokens"] * router.top_k, draws=draws, seed=seed):
            null = float(nulls.get(row["metric"], np.nan))
            rows.append(place | row | {"null": null, "n": int(tokens)})
        largest, before = (largest_load(loads) for loads in (load, tally.recorded[number]))
        rows.append(place | {"metric": "largest load", "value": largest, "recorded": before, "n": int(tokens)})
    return rows


def ratio_rows(sums: dict[str, Floats], slots: Floats, *, draws: int, seed: int) -> list[dict[str, Any]]:
    """Means with their intervals, and what they are under the recorded decisions.

    Args:
        sums: field → [document] sums, as a `Tally` has them.
        slots: [document] tokens × k.
        draws, seed: of the resampling.
    """
    tokens = sums["tokens"]
    measures = {
        "experts per token": (sums["experts"], tokens, float(slots.sum() / tokens.sum())),
        "agreement": (sums["kept"], slots, 1.0),
        "Jaccard": (sums["jaccard"], tokens, 1.0),
        "score kept": (sums["mass"], sums["recorded_mass"], 1.0),
        "tokens without an expert": (sums["none"], tokens, 0.0),
    }
    top, bottom = (np.stack([entry[place] for entry in measures.values()], axis=1) for place in (0, 1))
    value, low, high = bootstrap_ratio(top, bottom, draws=draws, seed=seed)
    return [
        {
            "metric": metric,
            "value": float(value[number]),
            "ci_low": float(low[number]),
            "ci_high": float(high[number]),
            "recorded": recorded,
        }
        for number, (metric, (_, _, recorded)) in enumerate(measures.items())
    ]


def largest_load(load: Floats) -> float:
    """Largest load over the mean; NaN where there is none."""
    return float(load.max() / load.mean()) if load.any() else float("nan")


def threshold_rows(routers: list[Asked], *, each: bool) -> list[dict[str, Any]]:
    """The thresholds, one for the model or one for each router."""
    rows: list[dict[str, Any]] = []
    for asked in routers if each else routers[:1]:
        if asked.limit is not None:
            place = (
                {"layer": asked.router.layer, "block": asked.router.block} if each else {"layer": None, "block": None}
            )
            rule: Any = asked.rule
            metric = f"threshold {rule.symbol}"
            rows.append(place | {"metric": metric, "value": rule.value(asked.limit), "n": len(asked.sample)})
    return rows


def size_rows(tallies: list[Tally], grouping: Grouping) -> list[dict[str, Any]]:
    """Share of tokens with m experts, over all routers."""
    if grouping.column is not None:
        return []
    sizes = np.zeros(max(len(tally.sizes) for tally in tallies), np.int64)
    for tally in tallies:
        sizes[: len(tally.sizes)] += tally.sizes
    total = int(sizes.sum())
    return [
        {
            "layer": None,
            "block": None,
            "metric": "tokens with m experts",
            "m": m,
            "value": int(count) / total,
            "n": total,
        }
        for m, count in enumerate(sizes)
        if count
    ]
