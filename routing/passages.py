"""Passages: where the model predicts best and worst, and where it routes those tokens."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pyarrow as pa

from moescope.core.analysis import Count, analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.routing.context import joined, pieces
from moescope.routing.grid import layer_name
from moescope.routing.predictions import require_predictions
from moescope.store.run import Run

_SQL = """
    WITH windows AS (
        SELECT t.sequence_id, t.position // $length AS part, min(t.token) AS first_token, max(t.token) AS last_token,
            min(t.position) AS position, avg(t.nll)::DOUBLE AS value, count(t.nll) AS n
        FROM tokens t
        WHERE t.run_id = $run
        GROUP BY t.sequence_id, part
        HAVING count(*) = $length AND count(t.nll) > 0
    ),
    ranked AS (
        SELECT *, row_number() OVER (ORDER BY value DESC, first_token) AS worst, row_number() OVER (ORDER BY value, first_token) AS best,
            count(*) OVER () AS windows
        FROM windows
    )
    SELECT r.*, s.label
    FROM ranked r
    JOIN sequences s ON s.run_id = $run AND s.sequence_id = r.sequence_id
    WHERE worst <= $top OR best <= $top
"""
_IDS = "SELECT token_id FROM tokens WHERE run_id = $run AND token BETWEEN $first AND $last ORDER BY token"
_ROUTING = """
    SELECT layer, block, expert, count(*) / any_value(tokens) AS share
    FROM (
        -- The window is counted before unnest: tokens, not decisions.
        SELECT layer, block, unnest(experts) AS expert, count(*) OVER (PARTITION BY layer, block) AS tokens
        FROM routing
        WHERE run_id = $run AND token BETWEEN $first AND $last
    )
    GROUP BY layer, block, expert
    QUALIFY row_number() OVER (PARTITION BY layer, block ORDER BY count(*) DESC, expert) = 1
    ORDER BY layer, block
"""


@analysis(
    name="passages",
    needs=("tokens",),
    source="mean next-token cross-entropy over windows of equal length",
    section="predictions",
    order=20,
)
def passages(run: Run, *, length: Count = 32, top: Count = 6) -> Result:
    """Which passages does the model predict worst and best, and which experts took them?

    Sequences are cut into windows of `length` tokens; windows are ranked by mean NLL. Beside each: for every router the expert
    chosen most often in the window, with its share of the window's tokens.

    Args:
        length: tokens of a passage.
        top: passages at each end.
    """
    require_predictions(run)
    frame = run.sql(_SQL, {"length": length, "top": top}).df()
    if frame.empty:
        raise InputError(f"run {run.name!r} has no passage of {length} tokens", fix="choose a smaller length")
    vocabulary = pieces(run)
    rows: list[dict[str, Any]] = []
    for kind, order in (("worst predicted", "worst"), ("best predicted", "best")):
        picked = frame[frame[order] <= min(top, max(1, int(frame["windows"].iloc[0]) // 2))].sort_values(order)
        rows += [_row(run, kind, window, vocabulary) for window in picked.itertuples()]
    table = pa.Table.from_pylist(rows)
    worst = next(r for r in rows if r["kind"] == "worst predicted")
    best = next((r for r in rows if r["kind"] == "best predicted"), worst)
    title = (
        f"The worst predicted {length} tokens cost {worst['value']:.2f} nats each "
        f"({_label(worst)}), the best {best['value']:.2f} ({_label(best)})"
    )
    return Result(
        title=title,
        table=table,
        n=int(frame["windows"].iloc[0]),
        n_unit=f"passages of {length} tokens",
        sql=_SQL,
        sql_parameters={"run": run.run_id, "length": length, "top": top},
        definition=f"Windows of {length} tokens by mean NLL; `routing` names for each router the "
        "expert chosen for most of the window's tokens, with that share.",
        units={"value": "nats per token", "position": "tokens from the start of the sequence"},
    )


def _row(run: Run, kind: str, window: Any, vocabulary: dict[int, bytes]) -> dict[str, Any]:
    span = {"first": int(window.first_token), "last": int(window.last_token)}
    ids = [token_id for (token_id,) in run.sql(_IDS, span).fetchall()]
    routing = run.sql(_ROUTING, span).fetchall()
    return {
        "kind": kind,
        "label": None if pd.isna(window.label) else window.label,
        "sequence_id": int(window.sequence_id),
        "position": int(window.position),
        "metric": "mean NLL",
        "value": float(window.value),
        "n": int(window.n),
        "text": joined(ids, vocabulary),
        "routing": "  ".join(f"{layer_name(a, b)}·E{e} {share:.0%}" for a, b, e, share in routing) or None,
    }


def _label(row: dict[str, Any]) -> str:
    return str(row["label"] or f"sequence {row['sequence_id']}")
