"""The token card: what was recorded of one token, and where to go from it."""

from __future__ import annotations

import math
from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.core.errors import InputError
from moescope.dashboard import cards, numbers
from moescope.dashboard.passage import passage
from moescope.dashboard.token_features import firing_on, read_autoencoders
from moescope.dashboard.token_path import NOT_RECORDED
from moescope.dashboard.token_text import PieceReader
from moescope.dashboard.token_view import NO_LABEL
from moescope.dashboard.url_state import ViewState, link
from moescope.store.run import Run

_ABOUT = """
    SELECT
        t.sequence_id, t.position, t.token_id, t.phase, t.nll, t.predicted_id, t.class,
        s.label, s.source, s.n_tokens, s.document_id, n.token_id
    FROM tokens t
    LEFT JOIN sequences s ON s.run_id = t.run_id AND s.sequence_id = t.sequence_id
    LEFT JOIN tokens n ON n.run_id = $run AND n.token = $token + 1 AND n.sequence_id = t.sequence_id
    WHERE t.run_id = $run AND t.token = $token
"""


def token_card(run: Run, state: ViewState) -> Any:
    """What is recorded of one token: text, likelihood, prediction, features, and a place for its path through the layers.

    Raises:
        InputError: the run has no such token.
    """
    token = state.token
    found = run.store.fetch(_ABOUT, {"run": run.run_id, "token": token})
    if not found or token is None:
        last = run.store.fetch("SELECT max(token) FROM tokens WHERE run_id = ?", [run.run_id])[0][0]
        raise InputError(
            f"run {run.name!r} has no token {token}",
            found="none" if last is None else f"tokens 0 to {last}",
            fix="click a token",
        )
    sequence, position, token_id, phase, nll, predicted, kind, label, source, length, document, following = found[0]
    shown = _pieces(run, [token_id, predicted, following])
    state = state.but(run=run.name)
    return dmc.Stack(
        [
            passage(run, token),
            cards.facts(
                [
                    ("Token id", _id(run, state, shown, token_id)),
                    ("Class", kind or NOT_RECORDED),
                    ("NLL", _nll(nll, position)),
                    ("Predicted next", _prediction(run, state, shown, predicted, following)),
                    ("Sequence", _sequence(run, state, sequence, position, length, phase)),
                    ("Document", numbers.MISSING if document is None else str(document)),
                    ("Label", _label(run, label)),
                    ("Source", numbers.MISSING if source is None else source),
                ]
            ),
            _ways(state),
            cards.section("Path through the layers", html.Div(id="token-path", className="token-path")),
            _features(run, state, sequence, position),
            dmc.Group(
                [
                    dmc.Anchor("← previous token", href=link("/tokens", state.but(token=token - 1)), size="sm")
                    if position
                    else None,
                    dmc.Anchor("next token →", href=link("/tokens", state.but(token=token + 1)), size="sm")
                    if following is not None
                    else None,
                ],
                justify="space-between",
            ),
        ],
        gap="lg",
    )


def _ways(state: ViewState) -> Any:
    """Where this token leads on other pages."""
    here = state.selection()
    ways = [
        ("Try in the Lab", link("/lab", here)),
        ("Heads", link("/phenomena", here.but(expert=None, sae=None, feature=None))),
    ]
    return dmc.Group([dmc.Anchor(text, href=href, size="sm") for text, href in ways], gap="md")


def _features(run: Run, state: ViewState, sequence: int, position: int) -> Any:
    if not read_autoencoders(run):
        return None
    firing = firing_on(run, sequence, position)
    chips = [
        html.Span(
            [
                dmc.Anchor(
                    f"F{feature}", href=link("/features", state.selection().but(sae=sae, feature=feature)), size="sm"
                ),
                f" {numbers.decimal(value, 2)}",
            ],
            className="path-expert",
            title=sae,
        )
        for sae, feature, value in firing
    ]
    body = (
        html.Div(chips, className="path-experts") if chips else dmc.Text("None in a kept example.", className="muted")
    )
    return cards.section("Features", body, note="Over 0 on this token, known only from the examples that were kept.")


def _sequence(run: Run, state: ViewState, sequence: int, position: int, length: int | None, phase: str | None) -> Any:
    here = ViewState(run=run.name, layer=state.layer, sequence=sequence, token=state.token)
    of = "" if length is None else f" of {length:,}"
    said = "" if phase in (None, "prefill") else f", {phase}"
    return [dmc.Anchor(str(sequence), href=link("/tokens", here), size="sm"), f", position {position:,}{of}{said}"]


def _label(run: Run, label: str | None) -> Any:
    text = "no label" if label is None else label
    there = ViewState(run=run.name, label=NO_LABEL if label is None else label)
    return dmc.Anchor(text, href=link("/tokens", there), size="sm", className="foreign")


def _pieces(run: Run, ids: list[int | None]) -> dict[int, str]:
    wanted = [i for i in ids if i is not None]
    rows = run.store.fetch(
        "SELECT token_id, bytes FROM vocabulary WHERE run_id = ? AND list_contains(?::INTEGER[], token_id)",
        [run.run_id, wanted],
    )
    vocabulary = {int(token_id): bytes(raw) for token_id, raw in rows if raw is not None}
    return {i: PieceReader(vocabulary).alone(i) for i in vocabulary}


def _id(run: Run, state: ViewState, shown: dict[int, str], token_id: int | None) -> Any:
    if token_id is None:
        return NOT_RECORDED
    all_of_it = ViewState(run=run.name, layer=state.layer, piece=token_id)
    number = dmc.Anchor(str(token_id), href=link("/tokens", all_of_it), size="sm")
    return [html.Span(shown[token_id], className="piece foreign"), " ", number] if token_id in shown else number


def _nll(nll: float | None, position: int) -> str:
    if nll is None or math.isnan(nll):
        return "none: nothing comes before the first token" if position == 0 else NOT_RECORDED
    return f"{numbers.decimal(nll)} nats, p = {math.exp(-nll):.3g}"


def _prediction(run: Run, state: ViewState, shown: dict[int, str], predicted: int | None, following: int | None) -> Any:
    if predicted is None:
        return NOT_RECORDED
    verdict: list[Any] = (
        ["  ·  the text ends here"]
        if following is None
        else ["  ✓ it came"]
        if predicted == following
        else ["  ✕ came ", *_listed(_id(run, state, shown, following))]
    )
    return [*_listed(_id(run, state, shown, predicted)), *verdict]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
