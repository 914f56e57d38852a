"""What the colours of the token view say, in words and numbers."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.dashboard import numbers
from moescope.dashboard.paint import Pin
from moescope.dashboard.records import Router, expert_name
from moescope.dashboard.token_changes import Change, Changes
from moescope.dashboard.token_features import FeatureOnTokens
from moescope.dashboard.token_view import Part
from moescope.dashboard.url_state import Mode, ViewState, link
from moescope.store.run import Run


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


def feature_legend(
    state: ViewState, part: Part, paint: dict[str, Any], palette: list[tuple[str, str]], found: FeatureOnTokens
) -> Any:
    """The scale of a feature, and that only the tokens of examples that were kept are known."""
    here = int((found.values > 0).sum())
    stops = ", ".join(palette[at][0] for at in range(0, len(palette), 32))
    name = f"F{state.feature}"
    only = state.with_rest(only="feature").but(page=1, token=None)
    parts: list[Any] = [
        dmc.Anchor(name, href=link("/features", state.selection()), size="sm"),
        html.Span(f"recorded only in {numbers.count(found.contexts)} kept contexts:", className="muted"),
    ]
    if here:
        parts += [
            html.Span([html.Span(className="swatch rest"), "0"], className="chip plain"),
            html.Span(className="ramp", style={"background": f"linear-gradient(90deg, {stops})"}),
            html.Span(f"{numbers.decimal(paint['high'], 2)}"),
        ]
    parts.append(
        html.Span(
            f"{numbers.count(paint['recorded'])} of the {numbers.count(len(part.token))} tokens here are in one; "
            f"it is over 0 on {numbers.count(here)} of them"
        )
    )
    if found.active is not None and found.tokens:
        parts.append(
            html.Span(
                f"({numbers.count(found.active)} of {numbers.count(found.tokens)} tokens that were encoded)",
                className="muted",
            )
        )
    if state.given("only") != "feature" and found.contexts:
        parts.append(dmc.Anchor("Show only the sequences that have one", href=link("/tokens", only), size="sm"))
    return html.Div(parts, className="legend")


def changes_legend(state: ViewState, router: Router, found: Changes, other: Run, change: Change) -> Any:
    """What changed against the other run, in numbers, and a switch between the kinds of change."""
    recorded = int((found.swapped >= 0).sum())
    if recorded == 0:
        return dmc.Text(
            f"{other.name} and this run share no recorded decision at {router.name} on these tokens.",
            className="muted foreign",
        )
    counts = {
        "all": recorded,
        "changed": int((found.swapped > 0).sum()),
        "lost": int((found.earlier & ~found.now).sum()),
        "gained": int((found.now & ~found.earlier).sum()),
    }
    focus = state.expert is not None
    switch = [
        dmc.Anchor(
            [html.Span(className=f"swatch change-{name}"), f"{name} {numbers.count(counts[name])}"],
            href=link("/tokens", state.with_rest(change=None if name == "all" else name).but(token=None)),
            className="chip chosen" if name == change else "chip",
            underline="never",
            anchorProps={"aria-current": "true"} if name == change else {},
        )
        for name in (("all", "changed", "lost", "gained") if focus else ("all", "changed"))
    ]
    words = [
        html.Span(f"Experts chosen at {router.name}, against", className="muted"),
        html.Span(other.name, className="foreign strong"),
        html.Span(f"({numbers.share(counts['changed'], recorded)} of tokens have other experts):", className="muted"),
        *switch,
    ]
    if not focus:
        words.append(html.Span("choose an expert for lost and gained", className="muted"))
    absent = len(found.swapped) - recorded
    if absent:
        text = f"{numbers.count(absent)} tokens not recorded in both"
        words.append(html.Span([html.Span(className="swatch absent"), text], className="chip plain"))
    return html.Div(words, className="legend")
