"""Entering what a run is made of, and giving it its final status."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import duckdb

from moescope.core.errors import RunError
from moescope.core.json_data import to_json
from moescope.store.coverage import Expectation, settle
from moescope.store.head_totals import fold_heads
from moescope.store.run import Run
from moescope.store.store import Store, forget_begun
from moescope.store.transaction import transaction


def end_run(
    store: Store, run: Run, expectations: Sequence[Expectation], summary: dict[str, Any], *, failed: bool
) -> None:
    """Write totals of heads, the ledger and the status: `complete` only if the ledger is full, `failed` where recording broke.

    Where even that cannot be written (a full disk), the run keeps the status `running`, which the next program that
    opens the store turns into `incomplete`.
    """
    connection = store.connection
    try:
        with transaction(connection):
            fold_heads(connection, run.run_id)
            full = settle(connection, run.run_id, expectations)
            status = "failed" if failed else "complete" if full else "incomplete"
            connection.execute(
                "UPDATE runs SET status = ?, finished_at = ?, summary = ? WHERE run_id = ?",
                [status, datetime.now(UTC).replace(tzinfo=None), to_json(summary), run.run_id],
            )
    except duckdb.Error as refused:
        forget_begun(run)
        if not failed:
            raise RunError(
                f"the ledger of run {run.name!r} could not be written",
                found=str(refused),
                fix="free some space on the disk and open the store again; what was committed is whole",
            ) from refused
