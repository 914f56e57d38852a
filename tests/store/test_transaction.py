"""Transactions: all or nothing, and a connection that works afterwards."""

from __future__ import annotations

import duckdb
import pytest

from moescope.store.run import Run
from moescope.store.store import Store
from moescope.store.transaction import transaction

_INSERT = "INSERT INTO batches VALUES (?, 0, 0, 1, 5)"


def test_what_is_done_inside_is_committed(store: Store, run: Run) -> None:
    with transaction(store.connection):
        store.connection.execute(_INSERT, [run.run_id])
        assert run.rows("batches") == 0, "nobody else sees it yet"
    assert run.rows("batches") == 1


def _fail(store: Store, run: Run, error: BaseException | str) -> None:
    with transaction(store.connection):
        store.connection.execute(_INSERT, [run.run_id])
        if isinstance(error, str):
            store.connection.execute(error)
        else:
            raise error


@pytest.mark.parametrize(
    "error", [ValueError("ours"), KeyboardInterrupt(), "SELECT * FROM nowhere", "ROLLBACK; SELECT 1/x"]
)
def test_error_inside_leaves_nothing_and_a_connection_that_works(
    store: Store, run: Run, error: BaseException | str
) -> None:
    with pytest.raises(duckdb.Error if isinstance(error, str) else type(error)):
        _fail(store, run, error)
    assert run.rows("batches") == 0
    with transaction(store.connection):
        store.connection.execute(_INSERT, [run.run_id])
    assert run.rows("batches") == 1
