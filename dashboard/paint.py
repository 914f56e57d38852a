"""What colours the tokens of a part: the chosen experts, or a quantity on a scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.dashboard.kept import Kept
from moescope.dashboard.records import Router
from moescope.dashboard.token_view import Ints, Part, packed
from moescope.dashboard.url_state import MAX_PINS, Mode
from moescope.store.run import Run

Floats = NDArray[np.float64]
STEPS = 254
"""Steps of a colour scale; 255 says that nothing was recorded."""

QUANTITIES: dict[Mode, tuple[str, str]] = {
    "weight": ("weight of the top expert", ""),
    "margin": ("routing margin", ""),
    "entropy": ("router entropy", "nats"),
    "nll": ("NLL of the token", "nats"),
    "norm": ("L2 norm of the residual stream", ""),
    "feature": ("activation", ""),
}

_AT_ROUTER = """
    SELECT token, experts[1] AS top, weights[1] AS weight, margin, entropy
    FROM routing
    WHERE run_id = $run AND layer = $layer AND block = $block AND token BETWEEN $first AND $last
    ORDER BY token
"""
_SLOT = """
    SELECT token, list_position(experts, $expert) AS slot
    FROM routing
    WHERE run_id = $run AND layer = $layer AND block = $block AND token BETWEEN $first AND $last
        AND list_contains(experts, $expert)
    ORDER BY token
"""
_NLL = "SELECT token, nll AS value FROM tokens WHERE run_id = $run AND token BETWEEN $first AND $last ORDER BY token"
_NORM = "SELECT token, norm AS value FROM residual WHERE run_id = $run AND layer = $layer AND token BETWEEN $first AND $last ORDER BY token"


_DECISIONS: Kept[Decisions] = Kept(8)
_SHARES: Kept[Floats] = Kept(512)


@dataclass(frozen=True)
class Pin:
    """One expert that carries a colour: its tokens as top expert in view, and their ratio to the reference."""

    expert: int
    tokens: int
    lift: float


@dataclass(frozen=True)
class Decisions:
    """A router's decisions on the tokens of a part; −1 and NaN where none was recorded."""

    top: Ints
    weight: Floats
    margin: Floats
    entropy: Floats


def decisions(run: Run, part: Part, router: Router) -> Decisions:
    """The decisions of one router on a part."""
    key = (part.key, len(part.token), router.layer, router.block)
    return _DECISIONS.of(run, key, lambda: _decided(run, part, router))


def slots(run: Run, part: Part, router: Router, expert: int) -> Ints:
    """The 1-based place of an expert among those chosen for each token of a part, 0 where it is not."""
    found = between(run, _SLOT, part, layer=router.layer, block=router.block, expert=expert)
    return spread(found["slot"], places(found, part), part, 0).astype(np.int64)


def _decided(run: Run, part: Part, router: Router) -> Decisions:
    found = between(run, _AT_ROUTER, part, layer=router.layer, block=router.block)
    place = places(found, part)
    return Decisions(
        top=spread(found["top"], place, part, -1).astype(np.int64),
        **{name: spread(found[name], place, part, math.nan) for name in ("weight", "margin", "entropy")},
    )


def token_values(run: Run, part: Part, mode: Mode, layer: int) -> Floats:
    """NLL, or the residual stream's norm at a layer, of each token of a part; NaN where none was recorded."""
    found = between(run, _NLL, part) if mode == "nll" else between(run, _NORM, part, layer=layer)
    return spread(found["value"], places(found, part), part, math.nan)


def choose_pins(run: Run, part: Part, router: Router, top: Ints, picked: tuple[int, ...]) -> list[Pin]:
    """The experts that carry colours: those picked, else the eight with the highest lift.

    Lift is the share of the part's tokens whose top expert it is, over its share in the whole run; where the part is the
    whole run, over the fair share. Experts on under 0.2 % of the tokens, or under three, are not chosen by themselves.
    """
    seen = np.bincount(top[top >= 0], minlength=router.experts)
    reference = np.full(router.experts, 1.0 / router.experts) if part.whole else run_shares(run, router)
    with np.errstate(divide="ignore", invalid="ignore"):
        lift = np.where(reference > 0, seen / max(seen.sum(), 1) / reference, 0.0)
    if not picked:
        enough = np.flatnonzero(seen >= max(3, math.ceil(0.002 * seen.sum())))
        picked = tuple(sorted(enough.tolist(), key=lambda e: (-lift[e], e))[:MAX_PINS])
    return [Pin(e, int(seen[e]), float(lift[e])) for e in picked if e >= 0]


def experts_paint(part: Part, router: Router, top: Ints, pins: list[Pin]) -> dict[str, Any]:
    """Top experts for the browser; the number after the last expert says that nothing was recorded."""
    return {
        "key": part.key,
        "kind": "experts",
        "absent": router.experts,
        "pins": [pin.expert for pin in pins],
        **packed(np.where(top < 0, router.experts, top), router.experts + 1),
    }


def scale_paint(part: Part, mode: Mode, values: Floats, *, silent: bool = False) -> dict[str, Any]:
    """A quantity for the browser, in steps between its 2nd and 98th percentile in the part; what lies beyond is clipped.

    Where `silent`, zeros carry no colour: the scale goes from 0 to the largest value, and step 0 is exactly 0.
    """
    recorded = np.isfinite(values)
    finite = values[recorded]
    steps = np.full(len(values), 255)
    if silent:
        low, high = 0.0, float(finite.max()) if finite.size and finite.max() > 0 else 1.0
        steps[recorded] = np.where(finite > 0, np.clip(np.ceil(finite / high * STEPS), 1, STEPS), 0)
    else:
        low, high = (float(x) for x in np.percentile(finite, [2, 98])) if finite.size else (0.0, 1.0)
        if low < high:
            steps[recorded] = np.clip(np.round((finite - low) / (high - low) * STEPS), 0, STEPS)
        else:
            steps[recorded] = STEPS // 2 * (1 + np.sign(finite - low))
    name, unit = QUANTITIES[mode]
    return {
        "key": part.key,
        "kind": "scale",
        "name": name,
        "unit": unit,
        "low": low,
        "high": high,
        "silent": silent,
        "recorded": int(finite.size),
        **packed(steps, 256),
    }


def run_shares(run: Run, router: Router) -> Floats:
    """[expert] share of the run's tokens whose top expert at a router it is."""
    return _SHARES.of(run, (router.layer, router.block), lambda: _shares(run, router))


def _shares(run: Run, router: Router) -> Floats:
    rows = run.store.fetch(
        """
        SELECT experts[1] AS top, count(*)
        FROM routing
        WHERE run_id = ? AND layer = ? AND block = ?
        GROUP BY top
        """,
        [run.run_id, router.layer, router.block],
    )
    counts = np.zeros(router.experts)
    for expert, n in rows:
        counts[expert] = n
    shares: Floats = counts / max(counts.sum(), 1.0)
    return shares


def between(run: Run, query: str, part: Part, **bound: Any) -> dict[str, Any]:
    """Columns of a query of the part's stretch of tokens, between `$first` and `$last`."""
    first, last = (int(part.token[0]), int(part.token[-1])) if len(part.token) else (0, -1)
    return run.sql(query, {"first": first, "last": last, **bound}).fetchnumpy()


def places(found: dict[str, Any], part: Part) -> tuple[Ints, NDArray[np.bool_]]:
    """For each record its index in the part, and which records belong to it."""
    at = np.searchsorted(part.token, found["token"])
    inside = (
        np.zeros(len(at), dtype=bool)
        if not len(part.token)
        else part.token[np.minimum(at, len(part.token) - 1)] == found["token"]
    )
    return at, inside


def spread(values: Any, place: tuple[Ints, NDArray[np.bool_]], part: Part, absent: float) -> Floats:
    """Values of records, as floats in the order of the part's tokens; `absent` where there is no record or a null."""
    at, inside = place
    filled = np.ma.filled(np.ma.asarray(values).astype(np.float64), absent)
    spread = np.full(len(part.token), absent)
    spread[at[inside]] = filled[inside]
    return spread
