"""From an address to the colours of the token view, their legend, and the sentence that says what is shown."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from moescope.core.errors import InputError
from moescope.dashboard import notices
from moescope.dashboard.paint import Decisions, choose_pins, decisions, experts_paint, scale_paint, token_values
from moescope.dashboard.palette import palette
from moescope.dashboard.records import Router, find_router, model_layers, routers
from moescope.dashboard.token_controls import AT_ROUTER, offered_modes
from moescope.dashboard.token_legend import heading, pins_legend, scale_legend
from moescope.dashboard.token_text import PieceReader
from moescope.dashboard.token_view import Part, find_part, packed
from moescope.dashboard.url_state import MAX_PINS, Mode, ViewState
from moescope.store.run import Run

_WHY_ABSENT: dict[Mode, str] = {
    "weight": "Record with the probe routing.",
    "margin": "Margins exist where the routing rule was verified.",
    "entropy": "Entropies need the router's logits.",
    "nll": "Record with the probe tokens.",
    "norm": "Record with the probe residual.",
}


class Painted(NamedTuple):
    """What goes to the browser.

    Attributes:
        colours: one number a token and what it means; None where there is nothing to colour.
        legend: what the colours say, or why there are none.
        heading: the filter as a sentence with its count.
        pages: how many pages the filtered run has.
    """

    colours: dict[str, Any] | None
    legend: Any
    heading: Any
    pages: int


def painted(run: Run, state: ViewState) -> Painted:
    """Colours, legend and heading of the token view; the legend is a refusal where the run has no such layer or expert.

    All are empty where the run has no such text: the callback that reads the text says why.
    """
    known = routers(run)
    state = state.but(run=run.name)
    mode = state.mode or offered_modes(run, known)[0]
    try:
        part = find_part(run, state)
    except InputError:
        return Painted(None, None, None, 1)
    router, taken = None, None
    if mode in AT_ROUTER or state.expert is not None:
        try:
            router = find_router(run, state, known)
        except InputError as refused:
            return Painted(None, notices.refusal(refused), None, part.pages)
        taken = decisions(run, part, router, state.expert)
    if mode == "pins" and router is not None and taken is not None:
        colours, legend = _pins(run, state, part, router, taken)
    else:
        colours, legend = _scale(run, state, mode, part, taken)
    hits = None
    if state.expert is not None or state.piece is not None:
        slots = (
            taken.slot if taken is not None and state.expert is not None else np.ones(len(part.token), dtype=np.int64)
        )
        hits = slots if state.piece is None else np.where(part.token_id == state.piece, slots, 0)
    colours |= {
        "hits": None if hits is None else packed(hits, 256),
        "focus": state.expert,
        "wanted": f"{part.key}|{state.layer}|{state.expert}|{state.piece}",
    }
    n = None if hits is None else int((hits > 0).sum()) if part.pages == 1 else _hits_on_all_pages(run, state, router)
    return Painted(colours, legend, heading(state, part, router, _piece(run, state.piece), n), part.pages)


def _pins(run: Run, state: ViewState, part: Part, router: Router, taken: Decisions) -> tuple[dict[str, Any], Any]:
    pins = choose_pins(run, part, router, taken.top, state.pins)
    if state.expert is not None and state.expert not in {pin.expert for pin in pins}:
        others = [pin.expert for pin in pins][: MAX_PINS - 1]
        pins = choose_pins(run, part, router, taken.top, (state.expert, *others))
    recorded = int((taken.top >= 0).sum())
    return experts_paint(part, router, taken.top, pins), pins_legend(state, part, router, pins, recorded)


def _scale(run: Run, state: ViewState, mode: Mode, part: Part, taken: Decisions | None) -> tuple[dict[str, Any], Any]:
    if mode in AT_ROUTER:
        values = getattr(taken, mode)
    else:
        layer = state.layer.number if state.layer is not None else next(iter(model_layers(run)), 0)
        values = token_values(run, part, mode, layer)
    colours = scale_paint(part, mode, values)
    return colours, scale_legend(mode, colours, part, palette(), why_absent=_WHY_ABSENT[mode])


def _hits_on_all_pages(run: Run, state: ViewState, router: Router | None) -> int:
    layer, block = (router.layer, router.block) if router is not None and state.expert is not None else (None, None)
    return int(
        run.store.fetch(
            """
        SELECT count(*)
        FROM tokens t
        JOIN sequences s ON s.run_id = t.run_id AND s.sequence_id = t.sequence_id
        LEFT JOIN routing r ON r.run_id = t.run_id AND r.token = t.token AND r.layer = $layer AND r.block = $block
        WHERE t.run_id = $run
            AND ($label IS NULL OR s.label = $label)
            AND ($sequence IS NULL OR s.sequence_id = $sequence)
            AND ($piece IS NULL OR t.token_id = $piece)
            AND ($expert IS NULL OR list_contains(r.experts, $expert))
        """,
            {
                "run": run.run_id,
                "layer": layer,
                "block": block,
                "label": state.label,
                "sequence": state.sequence,
                "piece": state.piece,
                "expert": state.expert,
            },
        )[0][0]
    )


def _piece(run: Run, token_id: int | None) -> str | None:
    if token_id is None:
        return None
    rows = run.store.fetch("SELECT bytes FROM vocabulary WHERE run_id = ? AND token_id = ?", [run.run_id, token_id])
    if not rows or rows[0][0] is None:
        return None
    return PieceReader({token_id: bytes(rows[0][0])}).alone(token_id)
