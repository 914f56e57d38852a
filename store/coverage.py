"""The coverage ledger: what the batches must give, beside what lies in the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import duckdb

from moescope.core.result import Result

if TYPE_CHECKING:
    from moescope.store.run import Run


@dataclass(frozen=True)
class Expectation:
    """What one site must give: events expected, and the query that counts them in the store.

    Attributes:
        site: the site's name, or a table's where it is not one site's.
        expected: events the batches must give.
        query: SQL giving one number; `$run`, `$site`, `$layer` and `$block` are bound.
        layer, block: where the site is; None for a table of the whole run.
        problem: a reason found while recording that makes the records invalid; None where there is none.
    """

    site: str
    expected: int
    query: str
    layer: int | None = None
    block: str | None = None
    problem: str | None = None


def settle(connection: duckdb.DuckDBPyConnection, run_id: str, expectations: Sequence[Expectation]) -> bool:
    """Count what is in the store, write the ledger, and say whether it is full.

    The count is taken from the committed tables, never from a counter kept while recording.
    """
    rows = []
    for item in expectations:
        bound: dict[str, object] = {"run": run_id, "site": item.site}
        bound |= {"layer": item.layer, "block": item.block} if item.layer is not None else {}
        used = {key: value for key, value in bound.items() if f"${key}" in item.query}
        recorded = int(connection.execute(item.query, used).fetchall()[0][0] or 0)
        status, detail = _judge(item, recorded)
        rows.append([run_id, item.site, item.expected, recorded, status, detail])
    connection.execute("DELETE FROM coverage WHERE run_id = ?", [run_id])
    if rows:
        connection.executemany("INSERT INTO coverage VALUES (?, ?, ?, ?, ?, ?)", rows)
    return all(row[4] == "complete" for row in rows)


def _judge(item: Expectation, recorded: int) -> tuple[str, str | None]:
    if recorded == item.expected:
        return ("invalid", item.problem) if item.problem else ("complete", None)
    if recorded == 0:
        return (
            "absent",
            item.problem or "nothing was recorded: the tap never fired; run `moescope doctor` on this model",
        )
    if recorded < item.expected:
        missing = f"{item.expected - recorded:,} events are missing"
        return (
            "short",
            f"{missing}: {item.problem or 'the run stopped early, or a tap missed batches; record it again'}",
        )
    return "excess", f"{recorded - item.expected:,} events too many: a tap fired twice; record the run again"


def coverage_result(run: Run) -> Result:
    """The ledger of a run as a `Result`, worst status first."""
    query = """
        SELECT site, expected, recorded, status, detail
        FROM coverage
        WHERE run_id = $run
        ORDER BY status = 'complete', rowid
    """
    found = run.sql(query).to_arrow_table()
    bad = sum(status != "complete" for status in found["status"].to_pylist())
    events = sum(found["recorded"].to_pylist())
    if found.num_rows == 0:
        title = f"Run {run.name!r} has no coverage ledger: it did not finish"
    elif bad:
        title = f"{bad} of {found.num_rows} sites of run {run.name!r} are not fully recorded"
    else:
        title = f"Everything expected was recorded: {found.num_rows} of {found.num_rows} sites are full"
    return Result(
        title=title,
        table=found,
        n=events,
        n_unit="recorded events",
        sql=query,
        sql_parameters={"run": run.run_id},
        definition="Events that the corpus must give (unmasked tokens × k at each router, tokens at each layer, …) "
        "beside the events counted in the store after the run.",
        units={"expected": "events", "recorded": "events"},
        name="coverage",
        source="count of committed rows",
        provenance=run.provenance,
        incomplete=not run.complete,
    )
