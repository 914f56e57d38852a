"""The filter of the token view as a sentence with its count; each clause can be taken away."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.dashboard import numbers
from moescope.dashboard.browser import named
from moescope.dashboard.records import Router, expert_name
from moescope.dashboard.token_view import NO_LABEL, Part
from moescope.dashboard.url_state import ViewState, link
from moescope.store.run import Run

Clause = tuple[str, dict[str, Any]]


def heading(state: ViewState, part: Part, router: Router | None, piece: str | None, hits: int | None) -> Any:
    """The filter as a sentence with its count; each clause can be taken away.

    Args:
        state: the address.
        part: what is on the page.
        router: at which the expert in focus was chosen.
        piece: the text of the token id in focus.
        hits: tokens that the filter picks out, over all pages; None without such a filter.
    """
    total = part.total
    if hits is None:
        sentence = f"{_many(total, 'token')} in {_many(len(part.sequences), 'sequence')}"
        if part.pages > 1:
            sentence = (
                f"{_many(total, 'token')}; page {part.page} of {part.pages} with {_many(len(part.token), 'token')}"
            )
    else:
        word = "decision" if state.expert is not None and state.expert >= 0 else "token"
        sentence = f"{_many(hits, word)} of {_many(total, 'token')}"
    clauses = _clauses(state, router, piece)
    badges = []
    for at, (text, without) in enumerate(clauses):
        badges += [html.Span("and", className="muted")] if at else []
        badges.append(_badge(text, link("/tokens", _without(state, without))))
    if state.expert is not None and state.expert >= 0 and not state.given("only"):
        href = link("/tokens", state.but(token=None, page=1).with_rest(only="expert"))
        badges.append(dmc.Anchor(f"only sequences that use {expert_name(state.expert)}", href=href, size="sm"))
    return html.Div(
        [
            html.H2(sentence, className="sentence"),
            *([html.Span("where", className="muted")] if clauses else []),
            *badges,
        ],
        className="filters",
    )


def neighbours(run: Run, state: ViewState) -> tuple[int | None, int | None]:
    """The sequence before and the one after the one in view, under the label in view; None at the ends."""
    rows = run.store.fetch(
        """
        SELECT
            max(sequence_id) FILTER (sequence_id < $sequence),
            min(sequence_id) FILTER (sequence_id > $sequence)
        FROM sequences
        WHERE run_id = $run AND ($label IS NULL OR coalesce(label, $unlabelled) = $label)
        """,
        {"run": run.run_id, "sequence": state.sequence, "label": state.label, "unlabelled": NO_LABEL},
    )
    before, after = rows[0]
    return before, after


def _clauses(state: ViewState, router: Router | None, piece: str | None) -> list[Clause]:
    clauses: list[Clause] = []
    if state.expert is not None and router is not None:
        gone = {"expert": None, "only": None, "change": None}
        clauses.append((f"layer = {router.name.removeprefix('L')}", {"layer": None, **gone}))
        clauses.append((f"expert = {expert_name(state.expert).removeprefix('E')}", gone))
    if state.piece is not None:
        clauses.append((f"token = {piece if piece is not None else state.piece}", {"piece": None}))
    if state.label is not None:
        text = "no label" if state.label == NO_LABEL else f"label = {state.label}"
        clauses.append((text, {"label": None, "page": 1}))
    if state.sequence is not None:
        clauses.append((f"sequence = {state.sequence}", {"sequence": None, "page": 1}))
    if state.given("only") == "expert" and state.expert is not None:
        clauses.append((f"sequence uses {expert_name(state.expert)}", {"only": None, "page": 1}))
    if state.given("only") == "feature" and state.feature is not None:
        clauses.append((f"sequence has a kept example of F{state.feature}", {"only": None, "page": 1}))
    return clauses


def _without(state: ViewState, gone: dict[str, Any]) -> ViewState:
    own = {name: value for name, value in gone.items() if name in ("only", "change")}
    fields = {name: value for name, value in gone.items() if name not in own}
    return state.but(token=None, **fields).with_rest(**own)


def _badge(text: str, href: str) -> Any:
    return html.Span(
        [
            html.Span(text, className="foreign"),
            dmc.Anchor("×", href=href, underline="never", anchorProps=named(f"remove {text}")),
        ],
        className="clause",
    )


def _many(n: int, word: str) -> str:
    return f"{numbers.count(n)} {word}{'' if n == 1 else 's'}"
