"""`Store`: a DuckDB file that holds runs."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import duckdb

from moescope.core.errors import InputError, StoreError
from moescope.core.text import escaped, whole_characters
from moescope.store.opening import open_connection
from moescope.store.run import UNSAID_END, Run


def check_run_name(name: str) -> None:
    """Refuse a name that no run can have: an empty one, or one that is not Unicode text."""
    if not name.strip() or whole_characters(name) != name:
        raise InputError("a run needs a name of Unicode text", found=repr(name))


# Runs this process began: another Store on the same file must not take them for abandoned.
_BEGUN_HERE: set[str] = set()


def forget_begun(run: Run) -> None:
    """A run whose end could not be written is abandoned after all."""
    _BEGUN_HERE.discard(run.run_id)


class Store:
    """A DuckDB file holding runs. One process may have it open for writing, or many for reading.

    Args:
        path: the file; made where it is not there yet.
        read_only: refuse every change, and let other readers in.

    Raises:
        StoreError: the file is missing, held by another process, damaged, newer, or another program's.

    Example:
        >>> import tempfile
        >>> with Store(Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     store.sql("SELECT count(*) FROM runs").fetchall()
        [(0,)]
    """

    def __init__(self, path: str | Path, *, read_only: bool = False) -> None:
        self.path = Path(path)
        self.read_only = read_only
        self._connection: duckdb.DuckDBPyConnection | None = open_connection(self.path, read_only=read_only)
        if not read_only:
            self._close_abandoned_runs()

    @property
    def connection(self) -> duckdb.DuckDBPyConnection:
        """The connection; raises `StoreError` once the store is closed."""
        if self._connection is None:
            raise StoreError(f"{self.path} is closed", fix="open it again: Store(path)")
        return self._connection

    def cursor(self) -> duckdb.DuckDBPyConnection:
        """A second connection to the same file, for another thread."""
        return self.connection.cursor()

    def sql(self, query: str, parameters: Mapping[str, Any] | Sequence[Any] | None = None) -> duckdb.DuckDBPyRelation:
        """Run one query and give a DuckDB relation (`.df()`, `.arrow()`, `.pl()`, `.fetchall()`).

        Args:
            query: SQL; parameters as `$name` or `?`.
            parameters: their values.
        """
        try:
            return self.cursor().sql(query, params=parameters)
        except duckdb.Error as refused:
            raise InputError("the query failed", found=str(refused)) from refused

    def fetch(self, query: str, parameters: Mapping[str, Any] | Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run one query and give all its rows."""
        try:
            return self.cursor().execute(query, parameters).fetchall()
        except duckdb.Error as refused:
            raise InputError("the query failed", found=str(refused)) from refused

    def run(self, name: str) -> Run:
        """The run called `name` (or with that run_id); raises `InputError` naming the runs there are."""
        rows = self._rows("WHERE name = $name OR CAST(run_id AS VARCHAR) = $name", {"name": name})
        if not rows:
            names = ", ".join(run.name for run in self.runs()) or "none yet"
            raise InputError(
                f"{self.path} has no run called {name!r}",
                found=f"runs: {names}",
                fix="choose one of these, or record it",
            )
        return rows[0]

    def runs(self) -> list[Run]:
        """All runs, oldest first."""
        return self._rows("", {})

    def begin_run(self, *, name: str, **columns: Any) -> Run:
        """Enter a new run with status `running`.

        Args:
            name: unique in the store.
            columns: the other columns of `runs`; dicts are stored as JSON.

        Raises:
            InputError: the name is taken, or empty.
        """
        if self.read_only:
            raise InputError(f"{self.path} is open for reading only", fix="open it with Store(path)")
        check_run_name(name)
        for status, started in self.fetch("SELECT status, started_at FROM runs WHERE name = ?", [name]):
            raise InputError(
                f"{self.path} already has a run called {name!r}",
                found=f"{status}, begun {started:%Y-%m-%d %H:%M} UTC",
                fix="choose another name (--name)",
            )
        values = {
            "run_id": str(uuid.uuid4()),
            "name": name,
            "status": "running",
            "started_at": datetime.now(UTC).replace(tzinfo=None),
            **columns,
        }
        row = {k: json.dumps(v, ensure_ascii=False) if isinstance(v, (dict, list)) else v for k, v in values.items()}
        names = ", ".join(f'"{column}"' for column in row)
        self.connection.execute(f"INSERT INTO runs ({names}) VALUES ({', '.join('?' * len(row))})", list(row.values()))
        _BEGUN_HERE.add(values["run_id"])
        return self.run(name)

    def add_layers(self, run: Run, rows: Sequence[Mapping[str, Any]]) -> None:
        """Enter what a run's model is made of: one mapping of column → value a sublayer."""
        for row in rows:
            values = {"run_id": run.run_id, **row}
            names = ", ".join(f'"{column}"' for column in values)
            self.connection.execute(
                f"INSERT INTO layers ({names}) VALUES ({', '.join('?' * len(values))})", list(values.values())
            )

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _close_abandoned_runs(self) -> None:
        """Mark runs whose recorder ended without saying so: only this process can be recording into a file it holds."""
        try:
            self.connection.execute(
                """
                UPDATE runs
                SET status = 'incomplete', summary = json_merge_patch(coalesce(summary, '{}'), ?)
                WHERE status = 'running' AND NOT list_contains(?::VARCHAR[], run_id::VARCHAR)
                """,
                [json.dumps({"stopped": UNSAID_END}), sorted(_BEGUN_HERE)],
            )
        except duckdb.Error as refused:
            self.close()
            raise StoreError(
                f"{self.path} cannot be written",
                found=str(refused),
                fix="free some space on the disk, or open it with read_only=True",
            ) from refused

    def _rows(self, where: str, parameters: Mapping[str, Any]) -> list[Run]:
        query = f"SELECT run_id, name FROM runs {where} ORDER BY started_at, name"
        return [Run(self, str(run_id), name) for run_id, name in self.fetch(query, parameters)]

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._connection is None:
            return f"Store({str(self.path)!r}, closed)"
        runs = ", ".join(f"{run.name} ({run.status})" for run in self.runs())
        return f"Store({str(self.path)!r}: {runs or 'no runs yet'})"

    def _repr_html_(self) -> str:
        if self._connection is None:
            return escaped(repr(self))
        rows = "".join(
            f"<tr><td>{escaped(r.name)}</td><td>{escaped(r.status)}</td><td>{escaped(str(r.model))}</td></tr>"
            for r in self.runs()
        )
        return f"<div><b>{escaped(str(self.path))}</b><table><tr><th>run</th><th>status</th><th>model</th></tr>{rows}</table></div>"
