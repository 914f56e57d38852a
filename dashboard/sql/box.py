"""Running one query that only reads, within limits, and stopping it."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import duckdb
import pyarrow as pa

from moescope.core.errors import InputError
from moescope.dashboard.sql.memory_bound import bounded_memory, half_of_the_rest
from moescope.dashboard.sql.one_select import OneSelect
from moescope.dashboard.sql.outcome import Column, Outcome, shown_as, tidy, weight
from moescope.store.locking import is_locked
from moescope.store.store import Store

T = TypeVar("T")
_GRACE = 2.0  # seconds that a query has for noticing that it is stopped


@dataclass(frozen=True)
class Limits:
    """What a query may take.

    Attributes:
        seconds: before it is interrupted.
        rows: that are kept for table and chart.
        characters: of one cell.
        bytes: of all cells together.
        growth: bytes by which the process may grow, unless something else in it needs memory too.
        together: queries that may run at the same time, those that would not stop included.
    """

    seconds: float = 10.0
    rows: int = 10_000
    characters: int = 1_000
    bytes: int = 4_000_000
    growth: int = 1 << 30
    together: int = 3


@dataclass
class _Running:
    """One query under way."""

    cursor: duckdb.DuckDBPyConnection
    who: str
    seconds: float
    cancelled: bool = False
    late: bool = False
    over: threading.Event = field(default_factory=threading.Event)
    answer: Any = None
    failure: BaseException | None = None

    @property
    def stopped(self) -> bool:
        """Whether it was told to stop."""
        return self.cancelled or self.late

    def wait(self) -> None:
        """Until it is over, or has been told to stop and does not."""
        end = time.monotonic() + self.seconds
        self.over.wait(self.seconds)
        while not self.over.is_set() and time.monotonic() < end + _GRACE:
            self.late = True
            self.stop()
            self.over.wait(0.05)

    def stop(self) -> None:
        """Interrupt it; a function that works on one value for long does not notice."""
        with suppress(duckdb.Error):
            self.cursor.interrupt()


class SqlBox:
    """Runs queries on cursors of their own, each in a transaction that can only read.

    Args:
        store: open and locked.
        limits: what a query may take.
        busy: whether something else in this process needs memory: a model that loads, a run that is recorded.
    """

    def __init__(
        self,
        store: Store,
        limits: Limits = Limits(),
        *,
        busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self.store, self.limits, self._busy = store, limits, busy
        self._running: list[_Running] = []
        self._lock = threading.Lock()

    def run(self, query: OneSelect, values: Mapping[str, Any], *, who: str = "") -> Outcome:
        """The first rows of a query, in forms that a page can hold.

        Args:
            query: read by `one_select`.
            values: of its parameters.
            who: the asker; a new query of the same one stops the one before.

        Raises:
            InputError: it fails, takes too long or too much, or was cancelled.
        """
        return self.with_cursor(lambda cursor: self._rows(cursor, query, values), who=who, seconds=self.limits.seconds)

    def with_cursor(self, work: Callable[[duckdb.DuckDBPyConnection], T], *, who: str, seconds: float) -> T:
        """Do something that only reads, on a thread of its own, and wait for it no longer than it may take."""
        running = self._begin(who, seconds)
        try:
            threading.Thread(target=self._work, args=(running, work), name="moescope-sql", daemon=True).start()
        except RuntimeError as refused:
            self._end(running)
            raise InputError(
                "the query could not be started", found=str(refused), fix="wait a moment, and run it again"
            ) from refused
        running.wait()
        if running.failure is not None and running.over.is_set():
            raise self._refusal(running, running.failure) from running.failure
        if not running.over.is_set():
            raise _too_slow(seconds, "it does not heed being stopped, and ends by itself later")
        answer: T = running.answer
        return answer

    def cancel(self, who: str) -> bool:
        """Stop what an asker has under way; gives whether there was something."""
        with self._lock:
            own = [running for running in self._running if running.who == who]
        for running in own:
            running.cancelled = True
            running.stop()
        return bool(own)

    def _begin(self, who: str, seconds: float) -> _Running:
        if who:
            self.cancel(who)
        with self._lock:
            if len(self._running) >= self.limits.together:
                raise InputError(
                    "too many queries run already",
                    found=f"{len(self._running)} that have not ended yet",
                    fix="wait a moment, and run it again",
                )
            running = _Running(self.store.cursor(), who, seconds)
            self._running.append(running)
        return running

    def _work(self, running: _Running, work: Callable[[duckdb.DuckDBPyConnection], Any]) -> None:
        # Here, not where it is waited for: what would not stop is held until it ends.
        try:
            with bounded_memory(half_of_the_rest() if self._busy() else self.limits.growth):
                self._do(running, work)
        finally:
            running.over.set()

    def _do(self, running: _Running, work: Callable[[duckdb.DuckDBPyConnection], Any]) -> None:
        cursor = running.cursor
        try:
            if not is_locked(cursor):
                raise InputError(
                    "this store is open without its locks, so that a query could reach files",
                    fix="open it with Store(path, locked=True) or read_only=True; moescope dashboard does",
                )
            cursor.execute("BEGIN TRANSACTION READ ONLY")
            if running.cancelled:
                raise duckdb.InterruptException("cancelled before it began")
            running.answer = work(cursor)
        except BaseException as failure:  # noqa: BLE001  told to whoever waits
            running.failure = failure
        finally:
            with suppress(duckdb.Error):
                cursor.execute("ROLLBACK")
            self._end(running)

    def _end(self, running: _Running) -> None:
        with suppress(duckdb.Error):
            running.cursor.close()
        with self._lock:
            self._running.remove(running)

    def _rows(self, cursor: duckdb.DuckDBPyConnection, query: OneSelect, values: Mapping[str, Any]) -> Outcome:
        begun = time.perf_counter()
        limits = self.limits
        columns = columns_of(cursor, query, values)
        places = [f"c{i}" for i in range(len(columns))]
        shown = [shown_as(column, place, limits.characters) for column, place in zip(columns, places, strict=True)]
        cursor.execute(wrapped(query, shown, places, limits.rows + 1), dict(values))
        rows: list[tuple[Any, ...]] = []
        room = limits.bytes
        while found := cursor.fetchmany(100):
            for row in found:
                tidied = tidy(row, limits.characters)
                room -= weight(tidied)
                if len(rows) == limits.rows or (room < 0 and rows):
                    cut = "" if len(rows) == limits.rows else f"their texts take more than {limits.bytes // 10**6} MB"
                    return Outcome(columns, rows, True, cut, time.perf_counter() - begun)
                rows.append(tidied)
        return Outcome(columns, rows, False, "", time.perf_counter() - begun)

    def _refusal(self, running: _Running, failure: BaseException) -> InputError:
        if isinstance(failure, InputError):
            return failure
        # A query that is stopped while its rows are handed over in batches ends in an error of these.
        if isinstance(failure, duckdb.InterruptException) or (
            running.stopped and isinstance(failure, pa.ArrowException)
        ):
            return _too_slow(running.seconds, None) if running.late else InputError("the query was cancelled")
        if isinstance(failure, (duckdb.OutOfMemoryException, MemoryError)):
            return InputError(
                "the query needs more memory than it may take",
                found=str(failure).split("\n", maxsplit=1)[0],
                fix="aggregate, or add a condition on layer or token",
            )
        if isinstance(failure, duckdb.PermissionException):
            return InputError("the query reaches for something outside the store", found=str(failure))
        if isinstance(failure, duckdb.Error):
            return InputError("the query failed", found=own_lines(str(failure)))
        return _unusual(failure)


def _unusual(failure: BaseException) -> InputError:
    """What parameters and types bring about that one side knows and the other does not."""
    if isinstance(failure, pa.ArrowException):
        fix = "cast the column to VARCHAR"
        return InputError("the result cannot be written in this form", found=str(failure), fix=fix)
    if isinstance(failure, (RecursionError, TypeError, ValueError, OverflowError)):
        return InputError("the query, or a value of its parameters, cannot be read", found=str(failure))
    raise failure


def columns_of(cursor: duckdb.DuckDBPyConnection, query: OneSelect, values: Mapping[str, Any]) -> tuple[Column, ...]:
    """The columns of a query's result."""
    cursor.execute(f"SELECT * FROM (\n{query.text}\n) LIMIT 0", dict(values))  # noqa: S608  read by `one_select`
    return tuple(Column(str(name), str(kind)) for name, kind, *_ in cursor.description or ())


def wrapped(query: OneSelect, shown: Sequence[str], places: Sequence[str], limit: int) -> str:
    """A query inside one that limits it.

    Args:
        query: read by `one_select`; it stands on lines of its own.
        shown: what to select, in terms of `places`.
        places: new names for its columns, which may share one.
        limit: rows.
    """
    return f"SELECT {', '.join(shown)} FROM (\n{query.text}\n) AS result({', '.join(places)}) LIMIT {limit}"  # noqa: S608  as above


def own_lines(message: str) -> str:
    """A message about the wrapped query, with the line numbers of the user's own text."""
    return re.sub(r"\bLINE (\d+):", lambda found: f"LINE {max(1, int(found[1]) - 1)}:", message)


def _too_slow(seconds: float, found: str | None) -> InputError:
    return InputError(
        f"the query took longer than {seconds:g} s and was stopped",
        found=found,
        fix="add a condition on run_id, layer or token, read `loads` instead of `routing`, or use Python: Store(path).sql(…)",
    )
