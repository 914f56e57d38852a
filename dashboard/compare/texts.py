"""The texts that two runs share, those whose NLL changed most first."""

from __future__ import annotations

from typing import Any

from dash import html

from moescope.dashboard import grids, numbers
from moescope.dashboard.token_text import brief, visible
from moescope.dashboard.url_state import ViewState, link
from moescope.routing.comparison.paired_sequences import SAME_SEQUENCES, pair_parameters
from moescope.store.run import Run

SHOWN = 200
_HEAD = 120

_CHANGED = "\n".join(
    (
        "WITH",
        SAME_SEQUENCES,
        """,
    first AS (
        SELECT sequence_id, sum(nll::DOUBLE) AS total, count(nll) AS n
        FROM tokens
        WHERE run_id = $run AND coalesce(phase, 'prefill') = 'prefill'
        GROUP BY sequence_id
    ),
    second AS (
        SELECT sequence_id, sum(nll::DOUBLE) AS total, count(nll) AS n
        FROM tokens
        WHERE run_id = $other AND coalesce(phase, 'prefill') = 'prefill'
        GROUP BY sequence_id
    ),
    told AS (
        SELECT
            s.sequence_id, s.other_id, s.document_id, s.label, s.n_tokens,
            f.total / nullif(f.n, 0) AS nll_a,
            o.total / nullif(o.n, 0) AS nll_b,
            o.total / nullif(o.n, 0) - f.total / nullif(f.n, 0) AS change
        FROM same_sequences s
        LEFT JOIN first f ON f.sequence_id = s.sequence_id
        LEFT JOIN second o ON o.sequence_id = s.other_id
        ORDER BY abs(change) DESC NULLS LAST, s.sequence_id
        LIMIT $shown
    )
    SELECT t.*, left(q.text, $head) AS head
    FROM told t
    JOIN sequences q ON q.run_id = $run AND q.sequence_id = t.sequence_id
    ORDER BY abs(change) DESC NULLS LAST, t.sequence_id
    """,
    )
)


def changed_texts(run: Run, other: Run) -> list[dict[str, Any]]:
    """sequence_id, other_id, document_id, label, n_tokens, nll_a, nll_b, change, head; the largest change first."""
    given = pair_parameters(run, other) | {"shown": SHOWN, "head": _HEAD}
    rows: list[dict[str, Any]] = run.store.sql(_CHANGED, given).to_arrow_table().to_pylist()
    return rows


def texts_grid(rows: list[dict[str, Any]], state: ViewState, pairs: int) -> Any:
    """The list; a click on a text lays its tokens side by side."""
    plain = state.selection().but(other=state.other, token=None, layer=None, expert=None)
    columns: list[dict[str, Any]] = [
        {**grids.link_column("text", "Text", flex=3, minWidth=220), "filter": True},
        grids.text_column("label", "Label", width=105),
        grids.number_column("n_tokens", "Tokens", ",d", width=85),
        grids.number_column("nll_a", "NLL, first", ".3f", width=92),
        grids.number_column("nll_b", "NLL, other", ".3f", width=95),
        grids.number_column("change", "Change, nats", "+.4f", width=110),
        grids.link_column("in_first", "Read", width=70),
        grids.link_column("in_other", "Read", width=76),
    ]
    shown = [
        {
            **{key: row[key] for key in ("label", "n_tokens", "nll_a", "nll_b", "change")},
            "id": str(row["sequence_id"]),
            "text": brief(visible(row["head"]), 90) if row["head"] else f"sequence {numbers.count(row['sequence_id'])}",
            "text_href": link("/compare", plain.but(sequence=row["sequence_id"])),
            "in_first": "in first",
            "in_first_href": link("/tokens", ViewState(run=state.run, sequence=row["sequence_id"], mode="nll")),
            "in_other": "in other",
            "in_other_href": link("/tokens", ViewState(run=state.other, sequence=row["other_id"], mode="nll")),
        }
        for row in rows
    ]
    return html.Div(
        grids.grid("cmp-texts", columns, shown, height=330, row_id="params.data.id", fit=None, tooltipShowDelay=300),
        title=None if len(rows) >= pairs else f"the {len(rows)} of {pairs:,} that changed most",
    )
