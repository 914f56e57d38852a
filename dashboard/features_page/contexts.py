"""Examples of a latent as text, each token tinted by its activation and a link to its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.dashboard import numbers
from moescope.dashboard.token_text import CONTINUES, PieceReader, brief
from moescope.dashboard.url_state import ViewState, link
from moescope.routing.context import pieces
from moescope.store.run import Run

_SQL = """
    SELECT c.stratum, c.rank, c.value, s.label, c.first_position, c.position, c.activations,
        list(t.position ORDER BY t.position) AS positions, list(t.token ORDER BY t.position) AS tokens,
        list(t.token_id ORDER BY t.position) AS token_ids
    FROM feature_contexts c
    JOIN sequences s ON s.run_id = c.run_id AND s.sequence_id = c.sequence_id
    JOIN tokens t ON t.run_id = c.run_id AND t.sequence_id = c.sequence_id
        AND t.position >= c.first_position AND t.position < c.first_position + len(c.activations)
    WHERE c.run_id = $run AND c.sae_id = $sae AND c.feature = $feature
        AND ((c.stratum = 0 AND c.rank < $most) OR (c.stratum > 0 AND c.rank < $drawn))
    GROUP BY ALL
    ORDER BY c.stratum, c.rank
"""
_MOST, _DRAWN = 10, 2
_BEFORE, _AFTER = 22, 12
_SPANS = 460
STEPS = 5


@dataclass(frozen=True)
class Piece:
    """Tokens that are shown as one span: a token with an activation alone, or those between without.

    Attributes:
        text: what they say.
        value: the activation; None where there is none, or where it was not encoded.
        token: run-wide number of a token with one.
        peak: whether it is the example's own.
    """

    text: str
    value: float | None
    token: int | None
    peak: bool


@dataclass(frozen=True)
class Example:
    """One window of text.

    Attributes:
        stratum, rank, value, label: as stored.
        token: run-wide number of the token of largest activation.
        pieces: its text.
    """

    stratum: int
    rank: int
    value: float
    label: str | None
    token: int
    pieces: tuple[Piece, ...]


def examples(run: Run, sae_id: str, feature: int) -> list[Example]:
    """The largest activations of a latent, one a document, then some drawn from quantiles of its activations."""
    given = {"sae": sae_id, "feature": feature, "most": _MOST, "drawn": _DRAWN}
    reader = PieceReader(pieces(run))
    return [_example(row, reader) for row in run.sql(_SQL, given).to_arrow_table().to_pylist()]


def _example(row: dict[str, Any], reader: PieceReader) -> Example:
    peak = row["positions"].index(row["position"]) if row["position"] in row["positions"] else 0
    first, last = max(0, peak - _BEFORE), peak + _AFTER + 1
    shown = reader.read(row["token_ids"])
    values = [_activation(row, position) for position in row["positions"]]
    found: list[Piece] = []
    for at in range(first, min(last, len(shown))):
        value, text = values[at], brief(shown[at] or CONTINUES)
        if value or at == peak:
            found.append(Piece(text, value, int(row["tokens"][at]), at == peak))
        elif found and found[-1].token is None:
            found[-1] = Piece(found[-1].text + text, None, None, False)
        else:
            found.append(Piece(text, None, None, False))
    return Example(row["stratum"], row["rank"], row["value"], row["label"], int(row["tokens"][peak]), tuple(found))


def _activation(row: dict[str, Any], position: int) -> float | None:
    value = row["activations"][position - row["first_position"]]
    return None if value is None else float(value)


def contexts(run: Run, found: list[Example], here: ViewState) -> Any:
    """Examples as lines of text, at most as many as a page carries."""
    if not found:
        return dmc.Text("No example is on record: it fires on none of the tokens that were read.", className="muted")
    most = max(example.value for example in found)
    lines: list[Any] = []
    spans, stratum = 0, -1
    for example in found:
        spans += len(example.pieces) + 4
        if spans > _SPANS:
            break
        if example.stratum != stratum:
            stratum = example.stratum
            lines.append(html.H3(_heading(stratum), className="sub-title"))
        lines.append(_line(example, most, run, here))
    return html.Div([_legend(most), *lines], className="contexts")


def _heading(stratum: int) -> str:
    if stratum == 0:
        return "Largest activations, one a document"
    return f"Drawn at random from quantile {stratum} of its activations" + (", the top one" if stratum == 1 else "")


def _line(example: Example, most: float, run: Run, here: ViewState) -> Any:
    text = [
        html.Span(piece.text, className="foreign")
        if piece.token is None
        else dmc.Anchor(
            piece.text,
            href=link("/tokens", here.but(run=run.name, token=piece.token)),
            className=f"foreign fires fires{step(piece.value, most)}{' fires-peak' if piece.peak else ''}",
            attributes={"root": {"title": "not encoded" if piece.value is None else f"{piece.value:.4g}"}},
            underline="never",
        )
        for piece in example.pieces
    ]
    return html.Div(
        [
            html.Div(
                [
                    html.Span(numbers.decimal(example.value, 2), className="mono"),
                    html.Span(example.label or "", className="soft foreign"),
                ],
                className="context-head",
            ),
            html.Div(text, className="context-text"),
        ],
        className="context",
    )


def step(value: float | None, most: float) -> int:
    """Which of the tints an activation has: 0 for none, up to the number of steps for the largest.

    Example:
        >>> step(None, 10.0), step(0.1, 10.0), step(10.0, 10.0)
        (0, 1, 5)
    """
    if not value or value < 0 or most <= 0:
        return 0
    return min(STEPS, 1 + int(STEPS * value / most))


def _legend(most: float) -> Any:
    chips = [
        html.Span(
            f"{numbers.decimal(most * n / STEPS, 1)} to {numbers.decimal(most * (n + 1) / STEPS, 1)}",
            className=f"fires fires{n + 1}",
        )
        for n in range(STEPS)
    ]
    return html.Div([html.Span("activation", className="soft"), *chips], className="legend")
