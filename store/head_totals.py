"""`heads` from `head_sequences`: the value of every head over the whole run, the same however the run was cut up."""

from __future__ import annotations

import duckdb

# One layer at a time, which bounds memory; sums in the order of sequences, to the bit.
_LAYERS = "SELECT DISTINCT layer FROM head_sequences WHERE run_id = ? ORDER BY layer"
_DELETE = """
    DELETE FROM heads
    WHERE run_id = $run AND (layer, block, metric, condition) IN (
        SELECT DISTINCT layer, block, metric, condition
        FROM head_sequences
        WHERE run_id = $run AND layer = $layer
    )
"""
_INSERT = """
    INSERT INTO heads (run_id, layer, head, metric, condition, value, n, block)
    SELECT
        $run, $layer, head, metric, condition,
        sum(total ORDER BY sequence_id) / sum(n),
        sum(n)::BIGINT,
        block
    FROM (
        SELECT
            sequence_id, block, metric, condition, n,
            generate_subscripts(sums, 1) - 1 AS head,
            unnest(sums)::DOUBLE AS total
        FROM head_sequences
        WHERE run_id = $run AND layer = $layer AND n > 0
    )
    GROUP BY block, metric, condition, head
    ORDER BY block, metric, condition, head
"""
_OTHERS = """
    SELECT count(*)
    FROM heads h
    WHERE h.run_id = ? AND NOT EXISTS (
        SELECT 1
        FROM head_sequences s
        WHERE s.run_id = h.run_id AND s.layer = h.layer AND s.block = h.block AND s.metric = h.metric
            AND s.condition = h.condition
    )
"""


def fold_heads(connection: duckdb.DuckDBPyConnection, run_id: str) -> None:
    """Write the rows of `heads` that follow from the run's `head_sequences`, in place of those there are.

    A value is the mean over all observations of all sequences: Σ sums ÷ Σ n. Rows that nothing by sequence stands behind
    stay as they are. The caller holds the transaction.
    """
    for (layer,) in connection.execute(_LAYERS, [run_id]).fetchall():
        for statement in (_DELETE, _INSERT):
            connection.execute(statement, {"run": run_id, "layer": layer})


def other_heads(connection: duckdb.DuckDBPyConnection, run_id: str) -> int:
    """Rows of `heads` that do not follow from `head_sequences`, so that nobody could say what several of them make together."""
    return int(connection.execute(_OTHERS, [run_id]).fetchall()[0][0])
