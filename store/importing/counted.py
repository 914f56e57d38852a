"""Files that only count: how often each expert was chosen, without the tokens. They give `loads` and nothing else."""

from __future__ import annotations

import duckdb
import pyarrow as pa

from moescope.core.errors import InputError
from moescope.core.sites import EXPERT_INDICES, Site
from moescope.store.coverage import Expectation
from moescope.store.importing.routers import Router
from moescope.store.importing.trace import Options, Trace

NO_DECISIONS = "the file counts and names no tokens: only `loads` is filled, and nothing can be asked of single tokens"
_LOADS = """
    INSERT INTO loads (run_id, layer, block, label, phase, expert, tokens, weight_sum)
    SELECT $run, layer, 'mlp', $label, NULL, expert, coalesce(c.tokens, 0), NULL
    FROM (SELECT layer, unnest(range(n_experts))::INTEGER AS expert FROM layers WHERE run_id = $run)
    LEFT JOIN moescope_counts c USING (layer, expert)
    ORDER BY layer, expert
"""
_EVENTS = "SELECT sum(tokens) FROM loads WHERE run_id = $run AND layer = $layer AND block = $block"


def count_table(layers: list[int], experts: list[int], tokens: list[int]) -> pa.Table:
    """Counts as a table: one row a layer and expert."""
    return pa.table(
        {
            "layer": pa.array(layers, pa.int64()),
            "expert": pa.array(experts, pa.int64()),
            "tokens": pa.array(tokens, pa.int64()),
        }
    )


def counted_routers(
    connection: duckdb.DuckDBPyConnection, trace: Trace, options: Options, called: object
) -> tuple[list[Router], list[Expectation]]:
    """The routers of `moescope_counts`, and what the ledger expects of each: as many choices as the busiest has.

    Raises:
        InputError: nothing was counted, a count is negative, or an expert's id is out of range.
    """
    counts = trace.counts
    connection.register("moescope_counts", counts)
    rows = connection.execute(
        """
        SELECT layer, sum(tokens), max(expert), min(expert), min(tokens), count(*) - count(DISTINCT expert)
        FROM moescope_counts
        GROUP BY layer
        ORDER BY layer
        """
    ).fetchall()
    if not rows or not any(row[1] for row in rows):
        raise InputError(f"{called} holds no counts")
    n_experts = options.n_experts or trace.n_experts or 1 + max(row[2] for row in rows)
    for layer, _, last, first, least, twice in rows:
        if first < 0 or last >= n_experts or least < 0 or twice or layer < 0:
            raise InputError(
                f"{called} counts what cannot be",
                expected=f"experts 0 to {n_experts - 1} once each, layers and counts from 0",
                found=f"layer {layer}: experts {first} to {last}, the smallest count {least}",
            )
    if options.n_experts is None and trace.n_experts is None:
        trace.notes.append(
            f"nobody said how many experts a layer has: {n_experts} were seen, later ones may be missing"
        )
    most = max(int(row[1]) for row in rows)
    k = options.top_k or trace.top_k
    routers = [Router(int(layer), "mlp", n_experts, 0, k or 0, 0, 0) for layer, *_ in rows]
    expectations = [
        Expectation(
            str(Site(r.layer, r.block, EXPERT_INDICES)),
            most,
            _EVENTS,
            r.layer,
            r.block,
            f"the counts of this layer are not a multiple of {k}" if k and int(row[1]) % k else None,
        )
        for r, row in zip(routers, rows, strict=True)
    ]
    return routers, expectations


def write_counts(connection: duckdb.DuckDBPyConnection, run_id: str, label: str | None) -> None:
    """Rows of `loads`, of every expert of every layer."""
    connection.execute(_LOADS, {"run": run_id, "label": label})
