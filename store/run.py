"""`Run`: one pass of a corpus through a model, as it lies in a store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import duckdb

from moescope.core.errors import InputError
from moescope.core.notebook_html import box, facts, first_rows, folded, heading
from moescope.core.result import Result
from moescope.store.coverage import coverage_result
from moescope.store.schema import TABLES
from moescope.store.views import VIEWS

if TYPE_CHECKING:
    from moescope.store.store import Store

UNSAID_END = "the recording process ended without saying so; committed batches are whole"
_JSON_COLUMNS = ("intervention", "settings", "versions", "summary", "anatomy")

# Tables whose rows belong to a run by another column.
_OWNER = {"effects": "base_run_id"}


class Run:
    """A run in a store; found with `store.run(name)`, made by `moescope.record`.

    Attributes:
        store: the store it lies in.
        run_id: its UUID.
        name: the user's name for it.

    Raises:
        InputError: by its properties, where the run was deleted from the store meanwhile.

    Example:
        >>> import pathlib, tempfile
        >>> import moescope as ms, pyarrow as pa
        >>> trace = pa.table({"sequence_id": [0], "position": [0], "layer": [3], "experts": [[5, 1]]})
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = store.import_trace(trace, name="tiny", n_experts=8)
        ...     run.status, run.rows("routing"), run.table("routing").df()["layer"].tolist()
        ('complete', 1, [3])
    """

    def __init__(self, store: Store, run_id: str, name: str) -> None:
        self.store, self.run_id, self.name = store, run_id, name

    @property
    def info(self) -> dict[str, Any]:
        """The run's row in `runs`, JSON columns read."""
        found = (
            self.store.sql("SELECT * FROM runs WHERE run_id = $run", {"run": self.run_id}).to_arrow_table().to_pylist()
        )
        if not found:
            raise InputError(f"run {self.name!r} is no longer in {self.store.path}")
        row: dict[str, Any] = found[0]
        row |= {key: json.loads(row[key]) if row[key] else {} for key in _JSON_COLUMNS}
        if self.store.read_only and row["status"] == "running":
            # Nobody can be recording into a file that others may read: its recorder ended without saying so.
            row["status"] = "incomplete"
            row["summary"] = {"stopped": UNSAID_END, **row["summary"]}
        return row

    @property
    def status(self) -> str:
        """`running`, `complete`, `incomplete` or `failed`."""
        return str(self.info["status"])

    @property
    def complete(self) -> bool:
        """Whether every expected event is in the store."""
        return self.status == "complete"

    @property
    def model(self) -> str:
        """What was loaded."""
        return str(self.info["model"])

    @property
    def coverage(self) -> Result:
        """The ledger: for each site, events expected beside events recorded."""
        return coverage_result(self)

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where a number from this run comes from: model, revision, corpus, versions, seed, status."""
        info = self.info
        picked = (
            "name",
            "run_id",
            "model",
            "revision",
            "architecture",
            "seed",
            "corpus_fingerprint",
            "status",
            "started_at",
        )
        facts = {key: str(info[key]) for key in picked if info[key] is not None}
        return {
            "run": info["name"],
            **facts,
            "versions": info["versions"],
            "intervention": info["intervention"] or None,
        }

    def table(self, name: str) -> duckdb.DuckDBPyRelation:
        """One table or view, limited to this run, as a DuckDB relation: `.df()`, `.pl()` and `.to_arrow_table()` read it.

        Args:
            name: of a table with runs in it (`routing`, `tokens`, `experts`, …; docs/store.md has all), or of a view. Of
                `effects`, those measured against this run.

        Raises:
            InputError: there is no such table; the message names those there are.
        """
        self._check_table(name)
        owner = _OWNER.get(name, "run_id")
        return self.store.sql(f'SELECT * EXCLUDE ({owner}) FROM "{name}" WHERE {owner} = $run', {"run": self.run_id})

    def rows(self, table: str) -> int:
        """How many rows of a table or view belong to this run."""
        self._check_table(table)
        query = f'SELECT count(*) FROM "{table}" WHERE {_OWNER.get(table, "run_id")} = ?'
        return int(self.store.fetch(query, [self.run_id])[0][0])

    def sql(self, query: str, parameters: Mapping[str, Any] | None = None) -> duckdb.DuckDBPyRelation:
        """A query in which `$run` is this run's id; one without it asks the whole store."""
        try:
            wanted = any("run" in statement.named_parameters for statement in duckdb.extract_statements(query))
        except duckdb.Error:  # it is told where it is run
            wanted = False
        return self.store.sql(query, ({"run": self.run_id} if wanted else {}) | dict(parameters or {}))

    def _check_table(self, name: str) -> None:
        columns = {entry.name: entry.columns for entry in TABLES} | {entry.name: entry.columns for entry in VIEWS}
        known = [entry for entry, of_it in columns.items() if any(column.name == "run_id" for column in of_it)]
        if name not in known:
            raise InputError(f"there is no table {name!r} of runs", expected=", ".join(known))

    def __repr__(self) -> str:
        info = self.info
        tokens = info["summary"].get("tokens")
        size = f", {tokens:,} tokens" if tokens else ""
        return f"Run({self.name!r}, {info['status']}, {info['model']}{size})"

    def _repr_html_(self) -> str:
        info = self.info
        summary, settings = info["summary"], info["settings"]
        stopped = "" if info["status"] == "complete" else summary.get("stopped") or ""
        shown = {
            "Model": " · ".join(str(info[key]) for key in ("model", "architecture", "revision") if info[key]),
            "Size": ", ".join(
                f"{summary[key]:,} {key}" if isinstance(summary[key], int) else f"{summary[key]} {key}"
                for key in ("tokens", "sequences", "documents")
                if summary.get(key) is not None
            ),
            "Probes": ", ".join(settings.get("probes", ())),
            "Sites": ", ".join(settings.get("sites", ())),
            "Intervention": json.dumps(info["intervention"], ensure_ascii=False) if info["intervention"] else "",
            "Begun": f"{info['started_at']:%Y-%m-%d %H:%M} UTC" if info["started_at"] else "",
            "Took": f"{summary['seconds']:,.1f} s" if isinstance(summary.get("seconds"), (int, float)) else "",
            "Store": str(self.store.path),
        }
        coverage = self.coverage
        return box(
            heading(f"Run {self.name}: {info['status']}", stopped),
            facts(shown),
            folded(coverage.title, first_rows(coverage, 40)),
            "<p><code>.table(name)</code> gives its rows, <code>moescope.analyze(run, name)</code> answers.</p>",
        )
