"""Totals of a merged run: the partial sums of its batches, folded in batch order, to the bit what one recording adds up.

Floating-point sums depend on their order, so the order is fixed: from the first batch to the last, one after the other.
"""

from __future__ import annotations

import duckdb

from moescope.store.merge_plan import MergePlan
from moescope.store.merge_rows import ROWS_A_PIECE
from moescope.store.store import Store

# Partials folded at a time: what bounds memory. The fold goes on from the sums so far, as batch −1.
ROWS_A_FOLD = 500_000
_LOAD_KEYS = "layer, block, label, phase, expert"
_EXPERT_KEYS = "layer, block, expert"
_IN_ORDER = "list_reduce(list({0} ORDER BY batch), lambda sofar, next: sofar + next) AS {0}"
_LOAD_SUMS = {"tokens": "BIGINT", "weight_sum": "DOUBLE"}
_EXPERT_SUMS = {
    "tokens": "BIGINT",
    "weight_sum": "DOUBLE",
    "norm_sum": "DOUBLE",
    "weighted_norm_sum": "DOUBLE",
    "neurons": "BIGINT",
    "active": "BIGINT",
    "zeros": "BIGINT",
}
# The largest |output| with where it was; of equals that of the earliest batch.
_EXPERT_MAXIMUM = "max_abs_out, max_abs_channel, max_abs_token"


def fold_totals(connection: duckdb.DuckDBPyConnection, run_id: str, plan: MergePlan) -> None:
    """Write `loads` and `experts` of a run whose partials are in place; which experts have a row, the shards say."""
    _fold(connection, run_id, "load_partials", _LOAD_KEYS, _LOAD_SUMS, "")
    _collect_keys(connection, plan, "loads", _LOAD_KEYS)
    connection.execute(
        """
        INSERT INTO loads
        SELECT $run, k.layer, k.block, k.label, k.phase, k.expert, coalesce(s.tokens, 0), coalesce(s.weight_sum, 0)
        FROM moescope_keys AS k
        LEFT JOIN moescope_sums AS s
            ON (k.layer, k.block, k.phase, k.expert) = (s.layer, s.block, s.phase, s.expert)
            AND k.label IS NOT DISTINCT FROM s.label
        ORDER BY k.layer, k.block, k.phase DESC, k.label, k.expert
        """,
        {"run": run_id},
    )
    _fold(connection, run_id, "expert_partials", _EXPERT_KEYS, _EXPERT_SUMS, _EXPERT_MAXIMUM)
    _collect_keys(connection, plan, "experts", _EXPERT_KEYS)
    connection.execute(
        """
        INSERT INTO experts
        SELECT $run, layer, block, expert, coalesce(tokens, 0), coalesce(weight_sum, 0),
            CASE WHEN tokens > 0 THEN norm_sum / tokens END,
            coalesce(weighted_norm_sum, 0),
            CASE WHEN tokens > 0 THEN max_abs_out END,
            CASE WHEN tokens > 0 THEN max_abs_channel END,
            CASE WHEN tokens > 0 THEN max_abs_token END,
            CASE WHEN neurons > 0 THEN active / neurons END,
            CASE WHEN neurons > 0 THEN zeros / neurons END
        FROM moescope_keys
        LEFT JOIN moescope_sums USING (layer, block, expert)
        ORDER BY layer, block, expert
        """,
        {"run": run_id},
    )
    for table in ("moescope_sums", "moescope_keys"):
        connection.execute(f"DROP TABLE IF EXISTS temp.{table}")


def _fold(
    connection: duckdb.DuckDBPyConnection, run_id: str, partials: str, keys: str, sums: dict[str, str], maximum: str
) -> None:
    """Fold partials into the temporary table `moescope_sums`."""
    values = ", ".join([*sums, maximum] if maximum else sums)
    folded = [
        f"CAST(sum({name}) AS BIGINT) AS {name}" if kind == "BIGINT" else _IN_ORDER.format(name)
        for name, kind in sums.items()
    ]
    if maximum:
        folded.append(f"unnest(first({{{_fields(maximum)}}} ORDER BY max_abs_out DESC, batch))")
    connection.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE moescope_sums AS
        SELECT {keys}, {values}
        FROM {partials}
        LIMIT 0
        """
    )
    for first, end in _slices(connection, run_id, partials):
        connection.execute(
            f"""
            CREATE OR REPLACE TEMP TABLE moescope_sums AS
            SELECT {keys}, {", ".join(folded)}
            FROM (
                SELECT batch, {keys}, {values}
                FROM {partials}
                WHERE run_id = $run AND batch >= $first AND batch < $end
                UNION ALL
                SELECT -1, {keys}, {values}
                FROM moescope_sums
            )
            GROUP BY {keys}
            """,
            {"run": run_id, "first": first, "end": end},
        )


def _fields(names: str) -> str:
    return ", ".join(f"'{name}': {name}" for name in names.split(", "))


def _slices(connection: duckdb.DuckDBPyConnection, run_id: str, partials: str) -> list[tuple[int, int]]:
    """Ranges of batches with about `ROWS_A_FOLD` partials each."""
    query = f"SELECT count(*), min(batch), max(batch) + 1 FROM {partials} WHERE run_id = ?"
    rows, first, end = connection.execute(query, [run_id]).fetchall()[0]
    if not rows:
        return []
    step = max(1, (end - first) * ROWS_A_FOLD // rows)
    return [(start, min(start + step, end)) for start in range(first, end, step)]


def _collect_keys(connection: duckdb.DuckDBPyConnection, plan: MergePlan, table: str, keys: str) -> None:
    """Which rows a table of totals has, into the temporary table `moescope_keys`: also of experts that were never chosen."""
    connection.execute(f"CREATE OR REPLACE TEMP TABLE moescope_keys AS SELECT {keys} FROM {table} LIMIT 0")
    for part in plan.parts:
        if not part.taken:
            continue
        with Store(part.shard.path, read_only=True) as source:
            query = f"SELECT {keys} FROM {table} WHERE run_id = $run"
            stream = source.sql(query, {"run": part.shard.run_id}).to_arrow_reader(ROWS_A_PIECE)
            connection.register("moescope_rows", stream)
            try:
                connection.execute(
                    f"""
                    INSERT INTO moescope_keys
                    SELECT {keys} FROM moescope_rows
                    EXCEPT
                    SELECT {keys} FROM moescope_keys
                    """
                )
            finally:
                connection.unregister("moescope_rows")
