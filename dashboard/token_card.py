"""The token card: one token's path through the layers, as it was recorded."""

from __future__ import annotations

import math
from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.core.errors import InputError
from moescope.dashboard import cards, numbers
from moescope.dashboard.passage import passage
from moescope.dashboard.records import Router, expert_name, layer_of, model_layers, routers
from moescope.dashboard.token_text import PieceReader
from moescope.dashboard.url_state import ViewState, link
from moescope.store.run import Run

_NOT_RECORDED = "not recorded"


def token_card(run: Run, state: ViewState) -> Any:
    """What is recorded of one token: text, likelihood, prediction, and at each layer its experts and its residual norm.

    Raises:
        InputError: the run has no such token.
    """
    token = state.token
    found = run.store.fetch(
        """
        SELECT t.sequence_id, t.position, t.token_id, t.phase, t.nll, t.predicted_id, t.class, s.label, s.source, s.n_tokens, n.token_id
        FROM tokens t
        LEFT JOIN sequences s ON s.run_id = t.run_id AND s.sequence_id = t.sequence_id
        LEFT JOIN tokens n ON n.run_id = t.run_id AND n.token = t.token + 1 AND n.sequence_id = t.sequence_id
        WHERE t.run_id = ? AND t.token = ?
        """,
        [run.run_id, token],
    )
    if not found or token is None:
        last = run.store.fetch("SELECT max(token) FROM tokens WHERE run_id = ?", [run.run_id])[0][0]
        raise InputError(
            f"run {run.name!r} has no token {token}",
            found="none" if last is None else f"tokens 0 to {last}",
            fix="click a token",
        )
    sequence, position, token_id, phase, nll, predicted, kind, label, source, length, following = found[0]
    shown = _pieces(run, [token_id, predicted, following])
    here = ViewState(run=run.name, layer=state.layer)
    return dmc.Stack(
        [
            passage(run, token),
            cards.facts(
                [
                    ("Token id", _id(shown, token_id)),
                    ("Class", kind or _NOT_RECORDED),
                    ("NLL", _nll(nll, position)),
                    ("Predicted next", _prediction(shown, predicted, following)),
                    (
                        "Sequence",
                        [
                            dmc.Anchor(
                                str(sequence), href=link("/tokens", here.but(sequence=sequence, token=token)), size="sm"
                            ),
                            f", position {position} of {length}" + (f", {phase}" if phase != "prefill" else ""),
                        ],
                    ),
                    ("Label", numbers.MISSING if label is None else label),
                    ("Source", numbers.MISSING if source is None else source),
                ]
            ),
            cards.section("Path through the layers", _path(run, token)),
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


def _path(run: Run, token: int) -> Any:
    known = routers(run)
    chosen = {
        (layer, block): rest
        for layer, block, *rest in run.store.fetch(
            "SELECT layer, block, experts, weights, margin, entropy FROM routing WHERE run_id = ? AND token = ?",
            [run.run_id, token],
        )
    }
    norms = dict(
        run.store.fetch("SELECT layer, norm FROM residual WHERE run_id = ? AND token = ?", [run.run_id, token])
    )
    body = []
    for layer in model_layers(run):
        here = [router for router in known if router.layer == layer]
        norm = numbers.decimal(norms[layer], 2) if layer in norms else _absent()
        body += [_row(router.name, _experts(run, router, known, chosen), norm) for router in here]
        if not here:
            body.append(_row(f"L{layer}", [_soft("dense"), numbers.MISSING, numbers.MISSING], norm))
    names = ["", "experts · weight", "margin", "entropy", "‖residual‖"]
    head = dmc.TableTr([dmc.TableTh(name, className="number" if at > 1 else "") for at, name in enumerate(names)])
    note = dmc.Text("Entropy in nats; experts by weight; norm at the layer's output.", className="muted")
    table = dmc.Table(
        [dmc.TableThead(head), dmc.TableTbody(body)],
        className="small-table path",
        verticalSpacing=3,
        horizontalSpacing=6,
    )
    return html.Div([table, note])


def _row(name: str, middle: list[Any], norm: Any) -> Any:
    experts, margin, entropy = middle
    return dmc.TableTr(
        [
            dmc.TableTd(name, className="soft"),
            dmc.TableTd(experts),
            dmc.TableTd(margin, className="number"),
            dmc.TableTd(entropy, className="number"),
            dmc.TableTd(norm, className="number"),
        ]
    )


def _experts(run: Run, router: Router, known: list[Router], chosen: dict[tuple[int, str], list[Any]]) -> list[Any]:
    if (router.layer, router.block) not in chosen:
        return [_absent(), _absent(), _absent()]
    experts, weights, margin, entropy = chosen[router.layer, router.block]
    here = ViewState(run=run.name, layer=layer_of(router, known))
    chips = [
        html.Span(
            [
                dmc.Anchor(expert_name(expert), href=link("/experts", here.but(expert=expert)), size="sm"),
                f" {numbers.decimal(weight)}",
            ],
            className="path-expert",
        )
        for expert, weight in zip(experts, weights or [None] * len(experts), strict=True)
    ]
    return [html.Div(chips, className="path-experts"), _value(margin), _value(entropy)]


def _value(value: float | None) -> Any:
    return _absent() if numbers.absent(value) else numbers.decimal(value)


def _absent() -> Any:
    return _soft(_NOT_RECORDED)


def _soft(text: str) -> Any:
    return html.Span(text, className="soft")


def _pieces(run: Run, ids: list[int | None]) -> dict[int, str]:
    wanted = [i for i in ids if i is not None]
    rows = run.store.fetch(
        "SELECT token_id, bytes FROM vocabulary WHERE run_id = ? AND list_contains(?::INTEGER[], token_id)",
        [run.run_id, wanted],
    )
    vocabulary = {int(token_id): bytes(raw) for token_id, raw in rows if raw is not None}
    return {i: PieceReader(vocabulary).alone(i) for i in vocabulary}


def _id(shown: dict[int, str], token_id: int | None) -> Any:
    if token_id is None:
        return _NOT_RECORDED
    return (
        [html.Span(shown[token_id], className="piece foreign"), f" {token_id}"] if token_id in shown else str(token_id)
    )


def _nll(nll: float | None, position: int) -> str:
    if nll is None or math.isnan(nll):
        return "none: nothing comes before the first token" if position == 0 else _NOT_RECORDED
    return f"{numbers.decimal(nll)} nats, p = {math.exp(-nll):.3g}"


def _prediction(shown: dict[int, str], predicted: int | None, following: int | None) -> Any:
    if predicted is None:
        return _NOT_RECORDED
    verdict: list[Any] = (
        ["  ·  the text ends here"]
        if following is None
        else ["  ✓ it came"]
        if predicted == following
        else ["  ✕ came ", *_listed(_id(shown, following))]
    )
    return [*_listed(_id(shown, predicted)), *verdict]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
