"""Entering what a run is made of, and giving it its final status."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import duckdb

from moescope.store.coverage import Expectation, settle
from moescope.store.run import Run
from moescope.store.store import Store


def end_run(
    store: Store, run: Run, expectations: Sequence[Expectation], summary: dict[str, Any], *, failed: bool
) -> None:
    """Write the ledger and the status: `complete` only if the ledger is full, `failed` where recording broke.

    Where even that cannot be written (a full disk), the run keeps the status `running`, which the next program that
    opens the store turns into `incomplete`.
    """
    connection = store.connection
    try:
        connection.execute("BEGIN TRANSACTION")
        full = settle(connection, run.run_id, expectations)
        status = "failed" if failed else "complete" if full else "incomplete"
        connection.execute(
            "UPDATE runs SET status = ?, finished_at = ?, summary = ? WHERE run_id = ?",
            [status, datetime.now(UTC).replace(tzinfo=None), json.dumps(summary, ensure_ascii=False), run.run_id],
        )
        connection.execute("COMMIT")
    except duckdb.Error:
        if not failed:
            raise
