"""What the colours and the filters of the token view say, in words and numbers."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.dashboard import numbers
from moescope.dashboard.paint import Pin
from moescope.dashboard.records import Router, expert_name
from moescope.dashboard.token_view import Part
from moescope.dashboard.url_state import Mode, ViewState, link


def pins_legend(state: ViewState, part: Part, router: Router, pins: list[Pin], recorded: int) -> Any:
    """A chip for each pinned expert with its number and lift, and what grey stands for."""
    if recorded == 0:
        return dmc.Text(f"No routing was recorded at {router.name} for these tokens.", className="muted")
    reference = "its fair share" if part.whole else "its share in the whole run"
    chips = [
        dmc.Anchor(
            [html.Span(className=f"swatch pin{at}"), f"{expert_name(pin.expert)} {numbers.ratio(pin.lift)}"],
            href=link(
                "/tokens", state.but(expert=None if state.expert == pin.expert else pin.expert, piece=None, token=None)
            ),
            className="chip chosen" if state.expert == pin.expert else "chip",
            underline="never",
            anchorProps={
                "title": f"{expert_name(pin.expert)}: top expert of {numbers.count(pin.tokens)} of {numbers.count(recorded)} tokens, "
                f"{numbers.ratio(pin.lift)} {reference}. Click to step through its tokens."
            },
        )
        for at, pin in enumerate(pins)
    ]
    rest = router.experts - len(pins)
    covered = sum(pin.tokens for pin in pins)
    chips.append(
        html.Span(
            [
                html.Span(className="swatch rest"),
                f"other {rest} experts, {numbers.share(recorded - covered, recorded)} of tokens",
            ],
            className="chip plain",
        )
    )
    absent = len(part.token) - recorded
    if absent:
        chips.append(
            html.Span(
                [html.Span(className="swatch absent"), f"{numbers.count(absent)} tokens not recorded"],
                className="chip plain",
            )
        )
    return html.Div(
        [html.Span(f"Top expert at {router.name}, × {reference}:", className="muted"), *chips], className="legend"
    )


def scale_legend(
    mode: Mode, paint: dict[str, Any], part: Part, palette: list[tuple[str, str]], *, why_absent: str
) -> Any:
    """The colour scale with its limits, and how many tokens have no record."""
    absent = len(part.token) - paint["recorded"]
    if paint["recorded"] == 0:
        return dmc.Text(f"The {paint['name']} was not recorded for these tokens. {why_absent}", className="muted")
    stops = ", ".join(palette[at][0] for at in range(0, len(palette), 32))
    unit = f" {paint['unit']}" if paint["unit"] else ""
    if paint["low"] == paint["high"]:
        return dmc.Text(
            f"{paint['name'][0].upper()}{paint['name'][1:]}: {numbers.decimal(paint['low'], 2)}{unit} nearly everywhere.",
            className="muted",
        )
    parts = [
        html.Span(f"{paint['name'][0].upper()}{paint['name'][1:]}:", className="muted"),
        html.Span(f"≤ {numbers.decimal(paint['low'], 2)}{unit}"),
        html.Span(className="ramp", style={"background": f"linear-gradient(90deg, {stops})"}),
        html.Span(f"≥ {numbers.decimal(paint['high'], 2)}{unit}"),
        html.Span("2nd to 98th percentile of the view", className="muted"),
    ]
    if absent:
        why = "not recorded, or first of their text" if mode == "nll" else "not recorded"
        parts.append(
            html.Span(
                [html.Span(className="swatch absent"), f"{numbers.count(absent)} tokens {why}"], className="chip plain"
            )
        )
    return html.Div(parts, className="legend")


def heading(state: ViewState, part: Part, router: Router | None, piece: str | None, hits: int | None) -> Any:
    """The filter as a sentence with its count; each clause can be taken away."""
    shown = len(part.token) if part.pages == 1 else part.total
    if hits is None:
        sentence = f"{numbers.count(shown)} tokens in {numbers.count(len(part.sequences))} sequences"
        if part.pages > 1:
            sentence = f"{numbers.count(shown)} tokens; page {part.page} of {part.pages}, {numbers.count(len(part.token))} tokens"
    else:
        sentence = f"{numbers.count(hits)} of {numbers.count(shown)} tokens"
    clauses: list[tuple[str, dict[str, Any]]] = []
    if state.expert is not None and router is not None:
        clauses.append((f"chose {router.expert_name(state.expert)}", {"expert": None}))
    if state.piece is not None:
        clauses.append((f"token = {piece if piece is not None else state.piece}", {"piece": None}))
    if state.label is not None:
        clauses.append((f"label = {state.label}", {"label": None, "page": 1}))
    if state.sequence is not None:
        clauses.append((f"sequence = {state.sequence}", {"sequence": None, "page": 1}))
    badges = [
        html.Span(
            [
                html.Span(text, className="foreign"),
                dmc.Anchor(
                    "×",
                    href=link("/tokens", state.but(token=None, **without)),
                    underline="never",
                    className="take-away",
                    anchorProps={"aria-label": f"remove {text}"},
                ),
            ],
            className="clause",
        )
        for text, without in clauses
    ]
    return html.Div(
        [
            html.Span(sentence, className="sentence"),
            *([html.Span("where", className="muted")] if badges else []),
            *badges,
        ],
        className="filters",
    )
