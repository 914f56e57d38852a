"""All chosen experts of the tokens that are in sight: what the line under the text says of the token under the pointer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moescope.core.errors import InputError
from moescope.dashboard.records import find_router, routers
from moescope.dashboard.url_state import decode
from moescope.store.run import Run

MOST = 6000

_CHOSEN = """
    SELECT token, experts, weights
    FROM routing
    WHERE run_id = $run AND layer = $layer AND block = $block AND token BETWEEN $first AND $last
    ORDER BY token
"""


def in_sight(run: Run, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """Experts and weights of the tokens from `first` to `last` at the router that the address `view` means.

    Gives None where the address names no router; tokens without a record are left out.
    """
    try:
        router = find_router(run, decode(asked["view"]), routers(run))
    except InputError:
        return None
    first = int(asked["first"])
    bound = {
        "layer": router.layer,
        "block": router.block,
        "first": first,
        "last": min(int(asked["last"]), first + MOST),
    }
    rows = run.sql(_CHOSEN, bound).fetchall()
    chosen = {
        token: [experts, [None if w is None else round(w, 4) for w in weights or []]]
        for token, experts, weights in rows
    }
    return {"view": asked["view"], "router": router.name, "chosen": chosen}
