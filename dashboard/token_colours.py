"""From an address to the colours of the token view, their legend, and the sentence that says what is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from moescope.core.errors import InputError
from moescope.dashboard import notices
from moescope.dashboard.kept import Kept
from moescope.dashboard.only import sequences_with
from moescope.dashboard.paint import (
    choose_pins,
    decisions,
    experts_paint,
    scale_paint,
    slots,
    token_values,
)
from moescope.dashboard.palette import palette
from moescope.dashboard.records import Router, find_router, model_layers, routers
from moescope.dashboard.token_changes import CHANGES, Change, changes, changes_paint, partners, shown
from moescope.dashboard.token_controls import AT_ROUTER, offered_modes
from moescope.dashboard.token_features import feature_on_tokens
from moescope.dashboard.token_heading import heading
from moescope.dashboard.token_legend import changes_legend, feature_legend, pins_legend, scale_legend
from moescope.dashboard.token_text import PieceReader
from moescope.dashboard.token_view import NO_LABEL, Ints, Part, find_part, packed
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


_PAINTED: Kept[Painted] = Kept(6)


@dataclass(frozen=True)
class _View:
    """What one painting is about."""

    run: Run
    state: ViewState
    part: Part
    router: Router | None


def painted(run: Run, state: ViewState) -> Painted:
    """Colours, legend and heading of the token view; the legend is a refusal where the run has no such layer or expert.

    All are empty where the run has no such text: the callback that reads the text says why.
    """
    state = state.but(token=None, q="", head=None, edits=())
    if state.mode in ("feature", "changed"):  # what these read may be written later
        return _painted(run, state)
    return _PAINTED.of(run, state, lambda: _painted(run, state))


def _painted(run: Run, state: ViewState) -> Painted:
    known = routers(run)
    state = state.but(run=run.name)
    mode = state.mode or offered_modes(run, known)[0]
    try:
        part = find_part(run, state)
    except InputError:
        return Painted(None, None, None, 1)
    try:
        at_router = mode in AT_ROUTER or mode == "changed" or state.expert is not None
        view = _View(run, state, part, find_router(run, state, known) if at_router else None)
        colours, legend, matches = _coloured(view, mode)
        picked = _picked(view)
    except InputError as refused:
        return Painted(None, notices.refusal(refused), None, part.pages)
    about_colours = picked is None or mode == "changed"
    hits = matches if about_colours else picked
    colours |= {
        "hits": None if hits is None else packed(hits, 256),
        "focus": state.expert,
        "layer": "" if view.router is None else view.router.name,
        "wanted": f"{part.key}|{state.layer}|{state.expert}|{state.piece}|{mode if about_colours else ''}"
        f"|{state.feature}|{state.given('change')}",
    }
    n = None
    if picked is not None:
        n = int((picked > 0).sum()) if part.pages == 1 else _hits_on_all_pages(view)
    return Painted(colours, legend, heading(state, part, view.router, _piece(run, state.piece), n), part.pages)


def _coloured(view: _View, mode: Mode) -> tuple[dict[str, Any], Any, Ints | None]:
    """Colours, legend, and the tokens that the colours are about where there are such."""
    if mode == "pins" and view.router is not None:
        return _pins(view, view.router)
    if mode == "changed" and view.router is not None:
        return _changed(view, view.router)
    if mode == "feature":
        return _feature(view)
    return _scale(view, mode)


def _pins(view: _View, router: Router) -> tuple[dict[str, Any], Any, None]:
    run, state, part = view.run, view.state, view.part
    top = decisions(run, part, router).top
    pins = choose_pins(run, part, router, top, state.pins)
    if state.expert is not None and state.expert not in {pin.expert for pin in pins}:
        others = [pin.expert for pin in pins][: MAX_PINS - 1]
        pins = choose_pins(run, part, router, top, (state.expert, *others))
    recorded = int((top >= 0).sum())
    return experts_paint(part, router, top, pins), pins_legend(state, part, router, pins, recorded), None


def _scale(view: _View, mode: Mode) -> tuple[dict[str, Any], Any, None]:
    run, state, part = view.run, view.state, view.part
    if mode in AT_ROUTER and view.router is not None:
        values = getattr(decisions(run, part, view.router), mode)
    else:
        layer = state.layer.number if state.layer is not None else next(iter(model_layers(run)), 0)
        values = token_values(run, part, mode, layer)
    colours = scale_paint(part, mode, values)
    return colours, scale_legend(mode, colours, part, palette(), why_absent=_WHY_ABSENT.get(mode, "")), None


def _feature(view: _View) -> tuple[dict[str, Any], Any, Ints]:
    found = feature_on_tokens(view.run, view.part, view.state.sae, view.state.feature)
    colours = scale_paint(view.part, "feature", found.values, silent=True)
    legend = feature_legend(view.state, view.part, colours, palette(), found)
    return colours, legend, np.where(found.values > 0, 1, 0)


def _changed(view: _View, router: Router) -> tuple[dict[str, Any], Any, Ints]:
    run, state = view.run, view.state
    names = partners(run)
    name = state.other or next((n for n in names if n != run.name), None)
    if name is None:
        raise InputError(
            f"no other run in this store read the texts of {run.name!r}",
            fix="record one over the same corpus, for instance under an intervention (the Lab saves such runs)",
        )
    other = run.store.run(name)
    found = changes(run, other, view.part, router, state.expert)
    change = _change(state)
    colours = changes_paint(view.part, router, found, other, state.expert)
    legend = changes_legend(state, router, found, other, change)
    return colours | {"change": change}, legend, shown(found, change).astype(np.int64)


def _change(state: ViewState) -> Change:
    given = state.given("change", "all")
    for change in CHANGES:
        if given == change:
            if change in ("lost", "gained") and state.expert is None:
                raise InputError(
                    f"{change} needs an expert", fix="choose one: lost and gained are said of the expert in focus"
                )
            return change
    raise InputError(f"the address has change={given[:40]!r}", expected=", ".join(CHANGES), fix="choose one of these")


def _picked(view: _View) -> Ints | None:
    """The tokens that the filter picks out: the slot of the expert in focus, 1 for tokens of a piece; None without a filter."""
    state, part = view.state, view.part
    expert = _chosen(state)
    if expert is None and state.piece is None:
        return None
    found: Ints = np.ones(len(part.token), dtype=np.int64)
    if expert is not None and view.router is not None:
        found = slots(view.run, part, view.router, expert)
    return found if state.piece is None else np.where(part.token_id == state.piece, found, 0)


def _chosen(state: ViewState) -> int | None:
    """The expert that tokens are picked out by; shared experts see every token, so they pick out none."""
    return state.expert if state.expert is not None and state.expert >= 0 else None


def _hits_on_all_pages(view: _View) -> int:
    state, expert = view.state, _chosen(view.state)
    router = view.router if expert is not None else None
    kept = sequences_with(view.run, state)
    everywhere = state.label is None and state.sequence is None and state.piece is None and kept is None
    if everywhere and router is not None and expert is not None:
        return _hits_of_an_expert(view.run, router, expert)
    return int(
        view.run.store.fetch(
            """
        SELECT count(*)
        FROM tokens t
        JOIN sequences s ON s.run_id = t.run_id AND s.sequence_id = t.sequence_id
        LEFT JOIN routing r ON r.run_id = t.run_id AND r.token = t.token AND r.layer = $layer AND r.block = $block
        WHERE t.run_id = $run
            AND ($label IS NULL OR coalesce(s.label, $unlabelled) = $label)
            AND ($sequence IS NULL OR s.sequence_id = $sequence)
            AND ($kept IS NULL OR list_contains($kept::BIGINT[], s.sequence_id))
            AND ($piece IS NULL OR t.token_id = $piece)
            AND ($expert IS NULL OR list_contains(r.experts, $expert))
        """,
            {
                "run": view.run.run_id,
                "layer": None if router is None else router.layer,
                "block": None if router is None else router.block,
                "label": state.label,
                "unlabelled": NO_LABEL,
                "sequence": state.sequence,
                "piece": state.piece,
                "expert": expert,
                "kept": kept,
            },
        )[0][0]
    )


def _hits_of_an_expert(run: Run, router: Router, expert: int) -> int:
    """The load of an expert, from the table that is the source of load."""
    asked = {"run": run.run_id, "layer": router.layer, "block": router.block, "expert": expert}
    query = (
        "SELECT sum(tokens) FROM loads WHERE run_id = $run AND layer = $layer AND block = $block AND expert = $expert"
    )
    return int(run.store.fetch(query, asked)[0][0] or 0)


def _piece(run: Run, token_id: int | None) -> str | None:
    if token_id is None:
        return None
    rows = run.store.fetch("SELECT bytes FROM vocabulary WHERE run_id = ? AND token_id = ?", [run.run_id, token_id])
    if not rows or rows[0][0] is None:
        return None
    return PieceReader({token_id: bytes(rows[0][0])}).alone(token_id)
