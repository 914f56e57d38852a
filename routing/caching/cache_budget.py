"""A cache budget shared out over layers so that the fewest experts have to be brought in."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.figures import CHANCE, SERIES
from moescope.core.result import Result
from moescope.core.statistics import bootstrap_ratio
from moescope.routing.caching.hit_rates import replay_all
from moescope.routing.caching.replay import POLICY_NAMES, Counts, Rule
from moescope.routing.caching.streams import Stream, chosen_sequences, layer_streams
from moescope.routing.grid import layer_name
from moescope.routing.trace import Trace, read_trace
from moescope.store.run import Run


@analysis(
    name="cache_budget",
    needs=("routing", "tokens", "sequences"),
    source="arXiv 2408.10284: dynamic programme over layers, here with replayed misses",
    section="caching",
    order=20,
)
def cache_budget(
    run: Run,
    *,
    budget: Count | None = None,
    policy: Literal["lru", "lfu", "fifo", "lifo", "look_ahead", "belady"] = "lru",
    horizon: Count = 16,
    least: Count | None = None,
    draws: Count = 1000,
    seed: Natural = 0,
) -> Result:
    """How should a budget of cached experts be shared out over layers, and what does it gain over equal shares?

    Every layer's misses are replayed at every size on half of the documents; an exact dynamic programme finds the sizes that
    sum to the budget at most and miss least. What that gains is measured on the other documents, against the same number for
    every layer. Misses are counted from empty caches, reset at each sequence.

    AdapMoE writes a layer's misses in closed form, as if the chosen experts were any two of E; here they are replayed, so that
    order and preference of real routing count.

    Args:
        budget: cached experts of all layers together; 3k a layer where not given.
        policy: how each cache replaces.
        horizon: tokens that look-ahead sees.
        least: smallest cache of a layer; 2k where not given, since a smaller one gives up experts of the token it serves.
        draws: bootstrap resamples of documents.
        seed: of the split of documents and of the resampling.
    """
    trace = read_trace(run)
    streams = layer_streams(trace)
    lower = np.array([min(least or 2 * stream.width, stream.experts) for stream in streams])
    upper = np.array([stream.experts for stream in streams])
    total = budget or int(np.minimum(3 * np.array([stream.width for stream in streams]), upper).sum())
    total = max(total, int(lower.sum())) if budget is None else total
    if not lower.sum() <= total <= upper.sum():
        raise InputError(
            f"a budget of {total:,} cached experts does not fit this model",
            expected=f"a budget from {lower.sum():,} (the least of every layer) to {upper.sum():,} (all experts)",
            fix="pass another budget, or a lower least",
        )
    fitted, held_out, split = _halves(trace, streams, Rule(policy, horizon), seed)
    shares = shared_out([(c.uses.sum() - c.hits.sum(0)) for c in fitted], lower, total)
    equal = equal_shares(upper, lower, total)
    rows = _rows(streams, held_out, shares, equal, draws, seed)
    return Result(
        title=_title(rows[-1], streams, shares, POLICY_NAMES[policy]),
        table=pa.Table.from_pylist(rows),
        draw=_draw,
        n=int(sum(c.uses.sum() for c in held_out)),
        n_unit="choices",
        definition="Experts cached in each layer so that replayed misses are fewest, found by an exact dynamic programme over "
        "the layers' miss curves; hit rates from empty caches, reset at each sequence.",
        units={"value": "experts, share of choices, or share of misses", "null": "as value"},
        interval=f"95 % percentile bootstrap over documents, {draws} resamples",
        null="the same budget in equal shares",
        computation="compiled replay of every layer at every size; min-plus dynamic programme",
        notes=(*trace.notes, split),
    )


def shared_out(misses: list[NDArray[np.float64]], least: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """The size of each cache that makes the sum of misses smallest.

    Args:
        misses: one a layer, [size] misses with 1, 2, … experts cached.
        least: smallest size of each layer.
        budget: sizes sum to this at most.

    Example:
        >>> shared_out([np.array([9.0, 1.0, 0.0]), np.array([5.0, 4.0, 3.0])], np.array([1, 1]), 3).tolist()
        [2, 1]
    """
    best = np.zeros(budget + 1)
    choices = []
    for curve, lowest in zip(misses, least, strict=True):
        after = np.full(budget + 1, np.inf)
        choice = np.zeros(budget + 1, np.int64)
        for size in range(int(lowest), min(len(curve), budget) + 1):
            cost = best[: budget + 1 - size] + curve[size - 1]
            better = cost < after[size:]
            after[size:][better] = cost[better]
            choice[size:][better] = size
        best = after
        choices.append(choice)
    left, sizes = budget, []
    for choice in reversed(choices):
        sizes.append(int(choice[left]))
        left -= sizes[-1]
    return np.array(sizes[::-1], np.int64)


def equal_shares(experts: NDArray[np.int64], least: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """The same number for every layer, one more for the first ones where it does not divide, within what each can hold."""
    sizes = least.astype(np.int64).copy()
    while (left := budget - int(sizes.sum())) > 0:
        lowest = sizes[sizes < experts].min()
        for layer in np.flatnonzero((sizes == lowest) & (sizes < experts))[:left]:
            sizes[layer] += 1
    return sizes


def _halves(trace: Trace, streams: list[Stream], rule: Rule, seed: int) -> tuple[list[Counts], list[Counts], str]:
    """Replays of one half of the documents and of the other; of all twice where there is only one document."""
    documents = trace.n_documents
    if documents < 2:
        chosen, tokens = chosen_sequences(trace, np.ones(len(trace.documents), np.bool_))
        counts = replay_all([stream.at(tokens) for stream in streams], chosen, rule)
        return counts, counts, "There is one document: shares are found and measured on the same tokens."
    drawn = np.random.default_rng(seed).permutation(documents) < documents // 2
    parts = []
    for half in (drawn, ~drawn):
        chosen, tokens = chosen_sequences(trace, half[trace.documents])
        parts.append(replay_all([stream.at(tokens) for stream in streams], chosen, rule))
    note = f"Shares are found on {drawn.sum():,} documents and measured on the other {(~drawn).sum():,}."
    return parts[0], parts[1], note


def _rows(
    streams: list[Stream],
    counts: list[Counts],
    shares: NDArray[np.int64],
    equal: NDArray[np.int64],
    draws: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Rows of each layer and of all; the last is the share of misses avoided."""
    by_need = np.stack([c.hits[:, size - 1] for c, size in zip(counts, shares, strict=True)], axis=1)
    by_rule = np.stack([c.hits[:, size - 1] for c, size in zip(counts, equal, strict=True)], axis=1)
    used = np.stack([c.uses for c in counts], axis=1)
    all_of = [np.concatenate([part, part.sum(1, keepdims=True)], axis=1) for part in (by_need, by_rule, used)]
    value, low, high = bootstrap_ratio(all_of[0], all_of[2], draws=draws, seed=seed)
    null, _, _ = bootstrap_ratio(all_of[1], all_of[2], draws=1, seed=seed)
    rows: list[dict[str, Any]] = []
    for i, stream in enumerate([*streams, None]):
        place = {"layer": stream.layer if stream else None, "block": stream.block if stream else None}
        blank = {"ci_low": None, "ci_high": None}
        experts = {"value": float(shares[i]), "null": float(equal[i])} if stream else None
        whole = {"value": float(shares.sum()), "null": float(equal.sum())}
        n = int(all_of[2][:, i].sum())
        rows.append(place | {"metric": "cached experts"} | (experts or whole) | blank | {"n": n})
        interval = {"ci_low": float(low[i]), "ci_high": float(high[i])}
        rate = {"value": float(value[i]), "null": float(null[i])}
        rows.append(place | {"metric": "hit rate"} | rate | interval | {"n": n})
    missed = all_of[2][:, -1] - all_of[1][:, -1]
    saved, least, most = bootstrap_ratio(all_of[0][:, -1] - all_of[1][:, -1], missed, draws=draws, seed=seed)
    saved = np.nan_to_num(saved)  # no misses at all: none to avoid
    rows.append(
        {"layer": None, "block": None, "metric": "misses avoided", "value": float(saved), "null": 0.0,
         "ci_low": float(least), "ci_high": float(most), "n": int(missed.sum())}
    )  # fmt: skip
    return rows


def _title(saved: dict[str, Any], streams: list[Stream], shares: NDArray[np.int64], policy: str) -> str:
    most, fewest = int(shares.argmax()), int(shares.argmin())
    change = f"{abs(saved['value']):.1%} {'less' if saved['value'] >= 0 else 'more'} than equal shares"
    if np.isfinite(saved["ci_low"]) and saved["ci_low"] <= 0 <= saved["ci_high"]:
        change = "as often as equal shares, within the interval"
    given = f"{streams[most].name} gets {shares[most]}, {streams[fewest].name} {shares[fewest]}"
    given = given if shares[most] > shares[fewest] else f"every layer gets {shares[most]}"
    return f"{shares.sum():,} cached experts shared out by need miss {change} ({policy}); {given}"


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    part = frame[(frame["metric"] == "cached experts") & frame["layer"].notna()]
    rate = frame[(frame["metric"] == "hit rate") & frame["layer"].notna()]
    x = [layer_name(int(layer), block) for layer, block in zip(part["layer"], part["block"], strict=True)]
    figure = go.Figure(
        go.Bar(
            x=x,
            y=part["value"],
            name="shared out by need",
            marker={"color": SERIES[0]},
            customdata=np.stack([rate["value"], rate["null"], part["null"]], axis=-1),
            hovertemplate="%{x}: %{y:,.0f} cached experts, hit rate %{customdata[0]:.1%}<br>"
            "equal shares: %{customdata[2]:,.0f}, hit rate %{customdata[1]:.1%}<extra></extra>",
        )
    )
    line = {"color": CHANCE, "dash": "dash"}
    figure.add_scatter(x=x, y=part["null"], mode="lines", name="equal shares", line=line)
    figure.update_xaxes(title="layer", type="category", nticks=min(len(x), 32))
    figure.update_yaxes(title="cached experts", rangemode="tozero")
    figure.update_layout(height=380)
    return figure
