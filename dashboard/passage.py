"""A few tokens round one, as text."""

from __future__ import annotations

from typing import Any

from dash import html

from moescope.dashboard.token_text import CONTINUES, PieceReader, brief
from moescope.store.run import Run

_BEFORE, _AFTER = 14, 10


def passage(run: Run, token: int) -> Any:
    """The text round a token, the token itself marked; "not recorded" where the run has no such token."""
    rows = run.store.fetch(
        """
        SELECT t.token, t.token_id, v.bytes
        FROM tokens t
        JOIN tokens c ON c.run_id = t.run_id AND c.sequence_id = t.sequence_id
        LEFT JOIN vocabulary v ON v.run_id = t.run_id AND v.token_id = t.token_id
        WHERE t.run_id = $run AND c.token = $token AND t.token BETWEEN $token - $before AND $token + $after
        ORDER BY t.token
        """,
        {"run": run.run_id, "token": token, "before": _BEFORE, "after": _AFTER},
    )
    if not rows:
        return html.Div("The token itself was not recorded.", className="muted")
    vocabulary = {int(token_id): bytes(raw) for _, token_id, raw in rows if raw is not None}
    shown = PieceReader(vocabulary).read([token_id for _, token_id, _ in rows])
    return html.Div(
        [
            html.Span(
                brief(text or CONTINUES),
                className="piece-here foreign" if number == token else "foreign",
            )
            for (number, _, _), text in zip(rows, shown, strict=True)
        ],
        className="passage",
    )
