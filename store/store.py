"""`Store`: a DuckDB file that holds runs."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import duckdb

from moescope.core.errors import InputError, StoreError
from moescope.core.notebook_html import box, grid, heading
from moescope.core.text import whole_characters
from moescope.store.compaction import Compacted, compact_file
from moescope.store.deleting import Deleted, delete_runs
from moescope.store.opening import concerns_file, explained, open_connection
from moescope.store.run import UNSAID_END, Run
from moescope.store.run_sizes import RunSize, run_sizes
from moescope.store.schema import TABLES
from moescope.store.views import VIEWS

# Runs that are shown: in a line of text, and in a notebook's table.
_NAMED, _LISTED = 8, 40


def check_run_name(name: str) -> None:
    """Refuse a name that no run can have: an empty one, or one that is not Unicode text."""
    if not name.strip() or whole_characters(name) != name:
        raise InputError("a run needs a name of Unicode text", found=repr(name))


# Runs this process began: another Store on the same file must not take them for abandoned.
_BEGUN_HERE: set[str] = set()


def remember_begun(run: Run) -> None:
    """This program writes the run: opening the store again does not close it as abandoned."""
    _BEGUN_HERE.add(run.run_id)


def forget_begun(run: Run) -> None:
    """A run whose end could not be written is abandoned after all."""
    _BEGUN_HERE.discard(run.run_id)


class Store:
    """A DuckDB file holding runs. One process may have it open for writing, or many for reading.

    A file that `with Store(path)` itself made is taken away again where the block ends in an `InputError` before anything was
    put into it; a file that was there before never is.

    Args:
        path: the file; made where it is not there yet, and upgraded where an older version of moescope wrote it: a copy
            of the file as it was is kept beside it, and the log says so.
        read_only: refuse every change, and let other readers in. Queries cannot touch files outside the store.
        folders: with `read_only` or `locked`, where queries may read and write files all the same.
        locked: close a store for writing in on itself too, as one for reading always is: no query touches a file outside
            it, sees a variable of the program or changes a setting. Recording works as ever; traces cannot be imported.
        memory: with `read_only` or `locked`, what DuckDB may keep in memory, for instance `1GiB`; beyond it queries spill.

    Raises:
        StoreError: the file is missing, held by another process, damaged, newer, or another program's; with `read_only`
            or `locked` also an older one.

    Example:
        >>> import pathlib, tempfile
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     store.sql("SELECT count(*) FROM runs").fetchall()
        [(0,)]
    """

    def __init__(
        self,
        path: str | Path,
        *,
        read_only: bool = False,
        folders: Sequence[str | Path] = (),
        locked: bool = False,
        memory: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.read_only = read_only
        self._folders, self._locked, self._memory = [Path(folder) for folder in folders], locked, memory
        # Where a file was made by this: absolute, since the folder of the program may change meanwhile.
        self._made = None if read_only or os.path.lexists(self.path) else Path(os.path.abspath(self.path))
        self._connection: duckdb.DuckDBPyConnection | None = self._opened()
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
        """Run one query and give a DuckDB relation (`.df()`, `.pl()`, `.to_arrow_table()`, `.fetchall()`).

        Args:
            query: SQL; parameters as `$name` or `?`.
            parameters: their values.

        Raises:
            InputError: the query is none, or asks for a table, column or file that is not there.

        Example:
            >>> import tempfile
            >>> with Store(Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
            ...     store.sql("SELECT $n + 1 AS next", {"n": 6}).df()["next"].tolist()
            [7]
        """
        try:
            return self.cursor().sql(query, params=parameters)
        except duckdb.Error as refused:
            raise self._failed(refused) from refused

    def fetch(self, query: str, parameters: Mapping[str, Any] | Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run one query and give all its rows."""
        try:
            return self.cursor().execute(query, parameters).fetchall()
        except duckdb.Error as refused:
            raise self._failed(refused) from refused

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

    def sizes(self) -> dict[str, RunSize]:
        """Room that each run takes, by run_id: an estimate for the tables, exact for the vectors beside the store."""
        return run_sizes(self)

    def check_writable(self) -> None:
        """Raise `InputError` where the store is open for reading only."""
        if self.read_only:
            raise InputError(f"{self.path} is open for reading only", fix="open it with Store(path)")

    def begin_run(self, *, name: str, **columns: Any) -> Run:
        """Enter a new run with status `running`.

        Args:
            name: unique in the store.
            columns: the other columns of `runs`; dicts are stored as JSON.

        Raises:
            InputError: the name is taken, or empty.
        """
        self.check_writable()
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
        insert = f"INSERT INTO runs ({names}) VALUES ({', '.join('?' * len(row))})"
        try:
            self.connection.execute(insert, list(row.values()))
        except duckdb.Error as refused:
            raise self._unwritten(refused) from refused
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

    def import_trace(
        self,
        source: Any,
        *,
        name: str,
        format: str | None = None,  # noqa: A002  the flag's name
        n_experts: int | None = None,
        top_k: int | None = None,
        n_null: int | None = None,
        layers: Sequence[int] | None = None,
        model: str | None = None,
        label: str | None = None,
        probabilities: bool = False,
        normalize: bool = False,
        tell: Callable[[str], None] | None = None,
    ) -> Run:
        """Read a routing trace of another program into a run; see `moescope.store.importing.import_trace.import_trace`.

        Example:
            >>> import tempfile, pyarrow as pa
            >>> trace = pa.table({"sequence_id": [0], "position": [0], "layer": [3], "experts": [[5, 1]]})
            >>> with Store(Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
            ...     store.import_trace(trace, name="tiny", n_experts=8).status
            'complete'
        """
        from moescope.store.importing.import_trace import import_trace

        return import_trace(
            self,
            source,
            name=name,
            format=format,
            n_experts=n_experts,
            top_k=top_k,
            n_null=n_null,
            layers=layers,
            model=model,
            label=label,
            probabilities=probabilities,
            normalize=normalize,
            tell=tell,
        )

    def delete_run(self, run: Run | str) -> Deleted:
        """Delete a run: its rows in every table, in one transaction, then its vectors. The next run uses the room.

        Args:
            run: the run, its name or its run_id.

        Raises:
            InputError: there is no such run, it is being recorded, or the store is open for reading only.
            RunError: its rows are deleted, but files of its vectors could not be.
        """
        return delete_runs(self, [self.run(run) if isinstance(run, str) else run])

    def compact(self) -> Compacted:
        """Write the file anew without the room that deleted runs left, and put the new one in its place in one step.

        Cursors and relations taken from this store before are closed by it.

        Raises:
            InputError: the store is open for reading only, or a run is being recorded.
            StoreError: something else uses the file, or there is no room for a second one. The store is as it was.
        """
        self.check_writable()
        if busy := [name for (name,) in self.fetch("SELECT name FROM runs WHERE status = 'running'")]:
            raise InputError(f"run {busy[0]!r} is being recorded", fix="wait until it is done, and compact then")
        self.close()
        try:
            return compact_file(self.path)
        finally:
            self._connection = self._opened()

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _opened(self) -> duckdb.DuckDBPyConnection:
        return open_connection(
            self.path, read_only=self.read_only, folders=self._folders, locked=self._locked, memory=self._memory
        )

    def _is_empty(self) -> bool:
        """Whether nothing was put into the file, and nobody else has it open here; what cannot be asked counts as full."""
        own = [table.name for table in TABLES]
        rows = " UNION ALL ".join(f'SELECT 1 FROM "{name}"' for name in own if name != "store_info")
        others = """
            SELECT 1 FROM duckdb_connection_count() WHERE count > 1
            UNION ALL
            SELECT 1 FROM duckdb_tables() WHERE NOT list_contains($own, table_name)
            UNION ALL
            SELECT 1 FROM duckdb_views() WHERE NOT internal AND NOT list_contains($own, view_name)
        """
        if self._connection is None:
            return False
        known = {"own": own + [view.name for view in VIEWS]}
        try:
            return not self._connection.execute(f"{rows} UNION ALL {others} LIMIT 1", known).fetchall()
        except duckdb.Error:
            return False

    def _failed(self, refused: duckdb.Error) -> InputError:
        text = str(refused)
        if "file system operations are disabled" in text:
            return InputError(
                "the query touches a file outside the store, which is closed in on itself"
                if self._locked
                else "the query touches a file outside the store, which was opened for reading only",
                found=text,
                fix="name the folder: Store(path, "
                + ("locked" if self._locked and not self.read_only else "read_only")
                + "=True, folders=[…])",
            )
        if concerns_file(refused):
            return explained(self.path, refused)
        return InputError("the query failed", found=text)

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
            raise self._unwritten(refused) from refused

    def _unwritten(self, refused: duckdb.Error) -> StoreError:
        return StoreError(
            f"{self.path} cannot be written",
            found=str(refused),
            fix="free some space on the disk, or open it with read_only=True",
        )

    def _rows(self, where: str, parameters: Mapping[str, Any]) -> list[Run]:
        query = f"SELECT run_id, name FROM runs {where} ORDER BY started_at, name"
        return [Run(self, str(run_id), name) for run_id, name in self.fetch(query, parameters)]

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A file that was made only for something that was then refused goes again.
        refused = kind is not None and issubclass(kind, InputError)
        unused = self._made if refused and self._made is not None and self._is_empty() else None
        self.close()
        if unused is not None:
            unused.unlink(missing_ok=True)

    def __repr__(self) -> str:
        if self._connection is None:
            return f"Store({str(self.path)!r}, closed)"
        found = self._listed()
        runs = ", ".join(f"{name} ({status})" for name, status, *_ in found[:_NAMED])
        more = f", … {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        return f"Store({str(self.path)!r}: {runs or 'no runs yet'}{more})"

    def _repr_html_(self) -> str:
        if self._connection is None:
            return box(heading(f"Store {self.path}", "closed"))
        found = self._listed()
        columns = ("run", "status", "model", "tokens", "begun (UTC)")
        size = f"{self.path.stat().st_size / 1e6:,.1f} MB" if self.path.exists() else ""
        told = [f"{len(found):,} run{'s' * (len(found) != 1)}", size, "open for reading only" if self.read_only else ""]
        more = f"<p>{len(found) - _LISTED:,} more: <code>.runs()</code></p>" if len(found) > _LISTED else ""
        table = grid(found[:_LISTED], columns, numbers=("tokens",)) if found else ""
        return box(heading(f"Store {self.path}", " · ".join(filter(None, told))), table, more)

    def _listed(self) -> list[tuple[Any, ...]]:
        """Name, status, model, tokens and begin of each run, oldest first."""
        query = """
            SELECT name, status, model, TRY_CAST(summary->>'tokens' AS BIGINT), strftime(started_at, '%Y-%m-%d %H:%M')
            FROM runs
            ORDER BY started_at, name
        """
        found = self.fetch(query)
        if self.read_only:  # nobody records into a file that others may read
            return [(name, "incomplete" if status == "running" else status, *rest) for name, status, *rest in found]
        return found
