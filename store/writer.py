"""The background writer: batches in, one transaction a chunk."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import duckdb
import pyarrow as pa

from moescope.core.errors import MoescopeError, RunError
from moescope.core.json_data import to_json
from moescope.store.resuming import Stopped
from moescope.store.store import Store
from moescope.store.totals import ExpertPartial, LoadPartial, expert_rows, load_rows
from moescope.store.transaction import transaction
from moescope.store.vector_shards import VectorRows, write_shards

CHUNK_ROWS = 245_760
CHUNK_SECONDS = 30.0
CHUNK_VECTOR_BYTES = 64 << 20  # of vectors waiting to be written
_QUEUE = 3
# What DuckDB may keep in memory while it writes. Without a limit it keeps every block it wrote, and memory grows with the
# corpus; beyond it, a large transaction goes through its temporary folder.
# Below 128 MiB it inserts with one thread, whatever it is allowed.
_MEMORY = "128MiB"
# A chunk is two row groups, which two threads compress at once; on few cores they take the time from nobody for long.
_THREADS = 2


@dataclass
class BatchRecords:
    """Everything one batch gave.

    Attributes:
        number: of the batch in the plan.
        batch: its first sequence, how many sequences, and how many unmasked tokens.
        tables: table name → rows, without run_id.
        loads, experts: its partial sums.
        vectors: rows for the shards beside the store.
    """

    number: int
    batch: tuple[int, int, int]
    tables: dict[str, pa.Table] = field(default_factory=dict)
    loads: list[LoadPartial] = field(default_factory=list)
    experts: list[ExpertPartial] = field(default_factory=list)
    vectors: list[VectorRows] = field(default_factory=list)


class RunWriter:
    """Writes the batches of one run on a thread of its own; a chunk of whole batches is one transaction.

    `submit` takes a function that makes the rows, so that turning tensors into rows also happens off the model's thread.
    It blocks once a few batches wait, which bounds memory. An error on the thread is raised by the next call.
    """

    def __init__(
        self,
        store: Store,
        run_id: str,
        *,
        chunk_rows: int = CHUNK_ROWS,
        chunk_seconds: float = CHUNK_SECONDS,
        progress: Callable[[], dict[str, Any]] | None = None,
        after: Stopped | None = None,
    ) -> None:
        """Begin to write.

        Args:
            store, run_id: where, and of which run.
            chunk_rows, chunk_seconds: a chunk is at least so many rows of its longest table, or waits no longer.
            progress: what the run needs to go on after being stopped; called on the writing thread, kept with each chunk.
            after: what the run had when it was stopped; its sums go on from there.
        """
        self._path = store.path
        self._cursor = store.cursor()
        self._settings = _frugal(self._cursor)
        self._run_id = run_id
        self._chunk_rows, self._chunk_seconds = chunk_rows, chunk_seconds
        self._queue: queue.Queue[Callable[[], BatchRecords] | None] = queue.Queue(maxsize=_QUEUE)
        self._error: BaseException | None = None
        self._pending: list[BatchRecords] = []
        self._since = time.monotonic()
        self._progress = progress
        self._loads: dict[tuple[int, str, str | None, str], LoadPartial] = after.loads if after else {}
        self._experts: dict[tuple[int, str, bool], ExpertPartial] = after.experts if after else {}
        self._shards: dict[str, int] = after.shards if after else {}
        self.committed_batches = 0
        self._thread = threading.Thread(target=self._work, name="moescope-writer", daemon=True)
        self._thread.start()

    def submit(self, make_rows: Callable[[], BatchRecords]) -> None:
        """Hand over one batch; raises `RunError` if an earlier one could not be written."""
        while True:
            self.check()
            try:
                self._queue.put(make_rows, timeout=0.2)
            except queue.Full:
                continue
            return

    def check(self) -> None:
        """Raise what went wrong on the writing thread, if anything did."""
        if self._error is not None:
            raise _explained(self._error) from self._error

    def close(self) -> None:
        """Write what waits and stop the thread; raises `RunError` if something could not be written."""
        while self._thread.is_alive() and self._error is None:
            try:
                self._queue.put(None, timeout=0.2)
                break
            except queue.Full:
                continue
        self._thread.join()
        _put_back(self._cursor, self._settings)
        self._cursor.close()
        self.check()

    def _work(self) -> None:
        try:
            while (make_rows := self._queue.get()) is not None:
                self._pending.append(make_rows())
                if self._full():
                    self._commit()
            self._commit()
        except BaseException as error:  # noqa: BLE001  handed to the thread that records, which raises it
            self._error = error

    def _full(self) -> bool:
        rows: Counter[str] = Counter()
        for batch in self._pending:
            rows.update({name: table.num_rows for name, table in batch.tables.items()})
        full = max(rows.values(), default=0) >= self._chunk_rows
        full |= sum(part.nbytes for b in self._pending for part in b.vectors) >= CHUNK_VECTOR_BYTES
        return full or time.monotonic() - self._since >= self._chunk_seconds

    def _commit(self) -> None:
        if not self._pending:
            return
        with transaction(self._cursor):
            for name in dict.fromkeys(name for b in self._pending for name in b.tables):
                rows = pa.concat_tables([b.tables[name] for b in self._pending if name in b.tables])
                # In one piece: DuckDB then builds whole row groups at a time, and several of them at once.
                self._insert(name, rows.combine_chunks())
            for batch in self._pending:
                row = [self._run_id, batch.number, *batch.batch]
                self._cursor.execute("INSERT INTO batches VALUES (?, ?, ?, ?, ?)", row)
            self._write_partials()
            # The files come first: a catalogue never names one that is not there. What a chunk that fails leaves is not named.
            vectors = (part for b in self._pending for part in b.vectors)
            if (shards := write_shards(self._path, self._run_id, vectors, self._shards)) is not None:
                self._insert("activations", shards)
            self._write_totals()
            if self._progress is not None:
                summary = to_json({"progress": self._progress()})
                self._cursor.execute("UPDATE runs SET summary = ? WHERE run_id = ?", [summary, self._run_id])
        self.committed_batches += len(self._pending)
        self._pending.clear()
        self._since = time.monotonic()

    def _insert(self, name: str, rows: pa.Table) -> None:
        columns = ", ".join(f'"{column}"' for column in rows.column_names)
        self._cursor.register("moescope_rows", rows)
        self._cursor.execute(
            f'INSERT INTO "{name}" (run_id, {columns}) SELECT ?, {columns} FROM moescope_rows', [self._run_id]
        )
        self._cursor.unregister("moescope_rows")

    def _write_partials(self) -> None:
        rows: dict[str, list[pa.Table | None]] = {"load_partials": [], "expert_partials": []}
        for batch in self._pending:
            for load in batch.loads:
                if load.key in self._loads:
                    self._loads[load.key].fold(load)
                else:
                    self._loads[load.key] = replace(load)
            for expert in batch.experts:
                if expert.key in self._experts:
                    self._experts[expert.key].fold(expert)
                else:
                    self._experts[expert.key] = replace(expert)
            extra = {"batch": batch.number}
            rows["load_partials"].append(load_rows(batch.loads, extra, only_used=True))
            rows["expert_partials"].append(expert_rows(batch.experts, extra, only_used=True))
        for table, parts in rows.items():
            if present := [part for part in parts if part is not None]:
                self._insert(table, pa.concat_tables(present))

    def _write_totals(self) -> None:
        for table in ("loads", "experts"):
            self._cursor.execute(f"DELETE FROM {table} WHERE run_id = ?", [self._run_id])
        if (rows := load_rows(self._loads.values(), {}, only_used=False)) is not None:
            self._insert("loads", rows)
        rows = expert_rows(self._experts.values(), {}, only_used=False)
        if rows is None:
            return
        self._cursor.register("moescope_rows", rows)
        self._cursor.execute(
            """
            INSERT INTO experts
            SELECT ?, layer, block, expert, tokens, weight_sum,
                CASE WHEN tokens > 0 THEN norm_sum / tokens END,
                weighted_norm_sum,
                CASE WHEN tokens > 0 THEN max_abs_out END,
                CASE WHEN tokens > 0 THEN max_abs_channel END,
                CASE WHEN tokens > 0 THEN max_abs_token END,
                CASE WHEN neurons > 0 THEN active / neurons END,
                CASE WHEN neurons > 0 THEN zeros / neurons END
            FROM moescope_rows
            """,
            [self._run_id],
        )
        self._cursor.unregister("moescope_rows")


def _frugal(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """Leave memory and most cores to the model while it runs; gives the settings changed.

    What the user has set stays, and a store whose configuration is locked is used as it is. (A memory limit cannot be put
    back exactly: DuckDB tells it rounded. So only its default is ever replaced.)
    """
    cores = os.cpu_count() or 1
    wanted = {
        "memory_limit": _MEMORY,
        "threads": str(max(min(_THREADS, cores), cores // 4)),
    }
    changed: list[str] = []
    with duckdb.connect(":memory:") as untouched, suppress(duckdb.Error):
        for name, value in wanted.items():
            query = f"SELECT current_setting('{name}')"
            if connection.execute(query).fetchall() == untouched.execute(query).fetchall():
                connection.execute(f"SET {name} = '{value}'")
                changed.append(name)
    return changed


def _put_back(connection: duckdb.DuckDBPyConnection, changed: list[str]) -> None:
    for name in changed:
        with suppress(duckdb.Error):  # what broke the store is told by whoever met it first
            connection.execute(f"RESET {name}")


def _explained(error: BaseException) -> MoescopeError:
    if isinstance(error, MoescopeError):
        return error
    text = str(error)
    if isinstance(error, (duckdb.Error, OSError)) and ("No space left" in text or "disk full" in text.lower()):
        return RunError(
            "the disk is full",
            found=text,
            fix="free some space and record the run again; chunks committed before are whole",
        )
    return RunError("the records could not be written", found=f"{type(error).__name__}: {text}")
