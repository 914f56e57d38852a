"""Cards of the cache simulators: what a cache of each size serves, and what it must move."""

from __future__ import annotations

from typing import Any

import pandas as pd

from moescope.core.result import Result
from moescope.dashboard import numbers
from moescope.dashboard.records import Router
from moescope.dashboard.routing_page.card_data import (
    Card,
    Cards,
    Range,
    busiest,
    joined,
    percent,
    share_interval,
    size,
)
from moescope.dashboard.url_state import ViewState
from moescope.routing.caching.replay import POLICY_NAMES
from moescope.routing.grid import layer_name
from moescope.store.run import Run

_PREDICTORS = {"token": "the token's id", "previous_layer": "the layer before", "popularity": "popularity"}


def span(known: list[Router]) -> Range:
    """From one slot to all experts of the largest layer; 2k where the address says nothing."""
    most, width = max(r.real for r in known), max(r.top_k for r in known)
    ends = sorted({1, width, 2 * width, most // 2, most} & set(range(1, most + 1)))
    marks = [value for i, value in enumerate(ends) if i == 0 or value - ends[i - 1] > most / 24]
    return Range(1, most, 1, min(2 * width, most), tuple((value, str(value)) for value in marks))


def cache(result: Result, run: Run, state: ViewState, known: list[Router]) -> Cards:
    """Hit rate of each policy at every size, beside Belady, random routing and shuffled tokens."""
    frame = result.df()
    whole, layers = frame[frame["layer"].isna()], frame[frame["layer"].notna()]
    best = dict(zip(*_columns(whole[whole["policy"] == "belady"], "size", "value"), strict=True))
    at: dict[str, dict[str, list[Card]]] = {}
    experts, held = _experts(known), _expert_bytes(state)
    links = busiest(run, known)
    for policy, part in whole.groupby("policy", sort=False):
        worst = _worst(layers[layers["policy"] == policy])
        at[str(policy)] = {
            str(int(row["size"])): _cache_cards(
                row, POLICY_NAMES[str(policy)], best, worst, experts, held, links, known
            )
            for row in part.to_dict("records")
        }
    sizes = sorted({int(s) for s in whole["size"]})
    return {
        "choice": ("policy", "lru"),
        "at": at,
        "words": {str(s): f"{s} of {max(r.real for r in known)} experts of a layer" for s in sizes},
        "marks": {str(s): [("x", float(s))] for s in sizes},
    }


def prefetch(result: Result, run: Run, state: ViewState, known: list[Router]) -> Cards:
    """Hit rate with prefetching at every size, beside the same cache without, and what is moved."""
    frame = result.df()
    whole = frame[frame["layer"].isna()]
    recall = whole[whole["metric"] == "recall"].set_index("predictor").to_dict("index")
    served = whole[whole["metric"] == "hit rate"]
    plain = {int(row["size"]): row for row in served[served["predictor"] == "none"].to_dict("records")}
    held = _expert_bytes(state)
    at: dict[str, dict[str, list[Card]]] = {}
    for predictor, part in served[served["predictor"] != "none"].groupby("predictor", sort=False):
        at[str(predictor)] = {
            str(int(row["size"])): _prefetch_cards(row, str(predictor), plain, recall, held)
            for row in part.to_dict("records")
        }
    sizes = sorted(plain)
    return {
        "choice": ("predictor", "token" if "token" in at else next(iter(at), "")),
        "at": at,
        "words": {str(s): f"{s} of {max(r.real for r in known)} experts of a layer" for s in sizes},
        "marks": {str(s): [("x", float(s))] for s in sizes},
    }


def _cache_cards(
    row: dict[str, Any],
    policy: str,
    best: dict[int, float],
    worst: dict[int, dict[str, Any]],
    experts: int,
    held: float | None,
    links: dict[tuple[int, str], tuple[str, str]],
    known: list[Router],
) -> list[Card]:
    at, n = int(row["size"]), int(row["n"])
    value = float(row["value"])
    moved = float(row["transfers"])
    each: Any = held * moved if held else row.get("bytes")
    slots = sum(min(at, router.real) for router in known)
    one = held or (each / moved if moved and not numbers.absent(each) else None)
    realisable = "" if row["realisable"] else "too small to be real"
    cards: list[Card] = [
        {
            "label": f"Hit rate, {policy}",
            "value": percent(value),
            "detail": joined(
                share_interval(row), f"{numbers.short_count(value * n)} of {numbers.short_count(n)}", realisable
            ),
        },
        {
            "label": "At best (Belady)",
            "value": percent(best.get(at)),
            "detail": f"{policy} leaves {100 * (best[at] - value):.1f} points" if at in best else "not computed",
        },
        {
            "label": "Routing at random",
            "value": percent(row["uniform"]) if not numbers.absent(row["uniform"]) else percent(min(at / experts, 1.0)),
            "detail": f"C ÷ experts · tokens shuffled: {percent(row['null'])}",
        },
        {
            "label": "Brought in a token",
            "value": size(each) if not numbers.absent(each) else f"{moved:.3g}",
            "detail": f"{moved:.3g} experts" + (f" of {size(one)}" if one else ", size not recorded"),
        },
        {
            "label": "Held on the device",
            "value": size(slots * one) if one else numbers.count(slots),
            "detail": f"{numbers.count(slots)} of {numbers.count(sum(r.real for r in known))} experts",
        },
    ]
    place = worst.get(at)
    if place is None:
        cards.append({"label": "Lowest layer", "value": numbers.MISSING, "detail": "one pool for all layers"})
        return cards
    name, href = links.get((place["layer"], place["block"]), ("", ""))
    cards.append(
        {
            "label": f"Lowest: {layer_name(place['layer'], place['block'])}",
            "value": percent(place["value"]),
            "detail": f"tokens of its busiest expert, {name}" if name else "",
            "href": href,
        }
    )
    return cards


def _prefetch_cards(
    row: dict[str, Any],
    predictor: str,
    plain: dict[int, dict[str, Any]],
    recall: dict[str, dict[str, Any]],
    held: float | None,
) -> list[Card]:
    at, n = int(row["size"]), int(row["n"])
    without = plain[at]
    moved, before = row["prefetched"] + row["on_demand"], without["prefetched"] + without["on_demand"]
    gain = 100 * (row["value"] - without["value"])
    found = recall[predictor]
    each = held * moved if held else row.get("bytes")
    known = not numbers.absent(each)
    return [
        {
            "label": f"Hit rate, by {_PREDICTORS[predictor]}",
            "value": percent(row["value"]),
            "detail": joined(share_interval(row), f"of {numbers.short_count(n)} on new documents"),
        },
        {
            "label": "Without prefetching",
            "value": percent(without["value"]),
            "detail": f"prefetching {'adds' if gain >= 0 else 'takes'} {abs(gain):.1f} points",
        },
        {
            "label": "Recall of the prediction",
            "value": percent(found["value"]),
            "detail": joined(share_interval(found), f"guessing: {percent(found['null'])}"),
        },
        {
            "label": "Brought in a token",
            "value": size(each) if known else f"{moved:.3g}",
            "detail": f"{row['prefetched']:.3g} ahead, {row['on_demand']:.3g} on demand",
        },
        {
            "label": "Against no prefetching",
            "value": numbers.ratio(moved / before if before else None),
            "detail": f"{moved:.3g} ÷ {before:.3g} experts a token",
        },
    ]


def _worst(layers: pd.DataFrame) -> dict[int, dict[str, Any]]:
    """Size → the row of the layer with the lowest hit rate."""
    if layers.empty:
        return {}
    found = layers.loc[layers.groupby("size")["value"].idxmin(), ["size", "layer", "block", "value"]]
    return {
        int(row["size"]): {"layer": int(row["layer"]), "block": str(row["block"]), "value": float(row["value"])}
        for row in found.to_dict("records")
    }


def _columns(frame: pd.DataFrame, *names: str) -> tuple[list[Any], ...]:
    return tuple([int(v) if name == "size" else float(v) for v in frame[name]] for name in names)


def _experts(known: list[Router]) -> int:
    return max(router.real for router in known)


def _expert_bytes(state: ViewState) -> float | None:
    """Bytes of an expert as the address gives them; None for what the run says. Raises `InputError` for no number."""
    given = state.whole("expert_bytes", 0)
    return float(given) if given else None
