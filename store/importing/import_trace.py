"""`import_trace`: a routing trace of another program becomes an ordinary run, or nothing."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb

from moescope.core.errors import InputError, MoescopeError, RunError
from moescope.core.json_data import to_json
from moescope.core.versions import library_versions
from moescope.store.coverage import Expectation, settle
from moescope.store.importing.checks import check_rows, check_tokens
from moescope.store.importing.counted import NO_DECISIONS, counted_routers, write_counts
from moescope.store.importing.formats import FORMATS, find_format
from moescope.store.importing.routers import Router, find_routers
from moescope.store.importing.rows import NUMBER_TOKENS, write_decisions, write_layers
from moescope.store.importing.staging import stage
from moescope.store.importing.trace import Options, Trace
from moescope.store.run import Run
from moescope.store.store import Store, check_run_name
from moescope.store.transaction import transaction

_LACKING = {
    "weights": "weights",
    "token_id": "token ids",
    "text": "text",
    "label": "labels",
    "margin": "margins",
    "entropy": "entropies",
}
_GAPS = """
    SELECT sum(last - first + 1), count(*) FILTER (first > 0)
    FROM (SELECT min(position) AS first, max(position) AS last FROM moescope_tokens GROUP BY sequence_id)
"""
_TOTALS = """
    SELECT
        count(*), count(*) FILTER (phase = 'decode'), count(DISTINCT sequence_id),
        count(DISTINCT coalesce(document_id, sequence_id))
    FROM moescope_tokens
"""


def import_trace(
    store: Store,
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
    """Read a routing trace into a run of its own, with the same ledger as a recorded one.

    Everything is written in one transaction: a trace that is refused, or an import that is stopped, leaves nothing behind.

    Args:
        store: open for writing.
        source: path of a file or folder, or a table of pyarrow, pandas, Polars, datasets or DuckDB.
        name: of the run; unique in the store.
        format: the program that wrote it: `neutral`, `vllm`, `sglang`, `llama.cpp`, `router_logits`, `olmoe`; None to find
            out from the file.
        n_experts: routed experts of a layer; needed where the file does not say.
        top_k: experts a token; where neither this nor the file says so, the commonest number of each layer.
        n_null: null (zero-computation) experts, whose ids follow the routed ones.
        layers: layer of each place along an array's layer axis, where the first places are not layers 0, 1, 2, ….
        model: what the trace was taken from.
        label: of every sequence that has none of its own.
        probabilities: for `router_logits`: the scores are probabilities already.
        normalize: for `router_logits`: the chosen experts' weights are scaled to sum to 1.
        tell: called with the name of each step before it is done.

    Returns:
        The run: `complete` where every token has k decisions at every router, else `incomplete` with the gaps, ids out of
        range and NaN in `run.coverage`. What the file lacks is null, and named in `run.info["summary"]["notes"]`.

    Raises:
        InputError: the file cannot be read, lacks columns, contradicts itself (told with the row), holds more than data, or
            the name is taken.
        RunError: the disk is full.

    Example:
        >>> import tempfile, pyarrow as pa
        >>> trace = pa.table({"sequence_id": [0, 0], "position": [0, 1], "layer": [3, 3], "experts": [[5, 1], [2, 5]]})
        >>> with Store(Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = import_trace(store, trace, name="tiny", n_experts=8)
        ...     run.status, run.rows("routing")
        ('complete', 2)
    """
    path = Path(source) if isinstance(source, str) else source
    options = Options(n_experts, top_k, n_null, tuple(layers) if layers is not None else None, probabilities, normalize)
    _check(store, name, format, options)
    if isinstance(path, Path):
        _check_path(path, format)
    return _Import(store, path, name, options, label, model, tell or (lambda _: None)).run(format or find_format(path))


def _check(store: Store, name: str, format_: str | None, options: Options) -> None:
    store.check_writable()
    check_run_name(name)
    if store.fetch("SELECT 1 FROM runs WHERE name = ?", [name]):
        raise InputError(f"{store.path} already has a run called {name!r}", fix="choose another name (--name)")
    if format_ is not None and format_ not in FORMATS:
        raise InputError(f"there is no format {format_!r}", expected=", ".join(FORMATS))
    for word, value, least in (
        ("n_experts", options.n_experts, 1),
        ("top_k", options.top_k, 1),
        ("n_null", options.n_null, 0),
    ):
        if value is not None and not least <= value <= 65_536:
            raise InputError(f"{word} cannot be {value}", expected=f"{least} to 65,536")


def _check_path(path: Path, format_: str | None) -> None:
    """Refuse what is not there, and what would never end: pipes and devices."""
    if not os.path.exists(path):  # unlike Path.exists, False also for names that no system can hold
        raise InputError(f"there is no file {path}", fix="check the path")
    if path.is_dir() and format_ not in (None, "neutral"):
        raise InputError(f"{path} is a folder", expected=f"a file of {format_}")
    if not path.is_dir() and not path.is_file():
        raise InputError(f"{path} is no file", found="a pipe or a device", fix="write the trace to a file first")


class _Import:
    """One import, on a connection of its own: what it stages is gone with it."""

    def __init__(
        self,
        store: Store,
        source: Any,
        name: str,
        options: Options,
        label: str | None,
        model: str | None,
        tell: Callable[[str], None],
    ) -> None:
        self.store, self.source, self.name, self.options = store, source, name, options
        self.label, self.model, self.tell = label, model, tell
        self.called = str(source) if isinstance(source, Path) else "the table"
        self.run_id = str(uuid.uuid4())
        self.begun = datetime.now(UTC).replace(tzinfo=None)
        self.summary: dict[str, Any] = {}

    def run(self, format_: str) -> Run:
        """Read, check, write."""
        started = time.perf_counter()
        connection = self.store.cursor()
        try:
            self.tell("reading")
            trace = FORMATS[format_](self.source, connection, self.options)
            if trace.counts is not None:
                self._write_counted(connection, trace, started)
            else:
                self._write_decided(connection, trace, started)
        except duckdb.Error as refused:
            raise _explained(self, refused) from refused
        finally:
            connection.close()
        return self.store.run(self.run_id)

    def _write_decided(self, connection: duckdb.DuckDBPyConnection, trace: Trace, started: float) -> None:
        left_out = stage(trace, connection, self.called)
        self.tell("checking")
        rows = check_rows(connection, self.called)
        check_tokens(connection, self.called)
        connection.execute(NUMBER_TOKENS)
        routers = find_routers(connection, trace, self.options, self.called)
        self._stage_sequences(connection, trace)
        tokens, generated, sequences, documents = connection.execute(_TOTALS).fetchall()[0]
        spanned, late = connection.execute(_GAPS).fetchall()[0]
        expected = max(int(spanned), trace.expected_tokens or 0)
        self.summary = {
            "tokens": tokens,
            "generated_tokens": generated,
            "sequences": sequences,
            "documents": documents,
            "rows": rows,
            "notes": [*trace.notes, *self._lacking(connection), *_said(late, left_out)],
        }
        expectations = [
            Expectation("sequences", sequences, "SELECT count(*) FROM sequences WHERE run_id = $run"),
            Expectation(
                "tokens",
                expected,
                "SELECT count(*) FROM tokens WHERE run_id = $run",
                problem="positions are missing inside of sequences" if expected > tokens else None,
            ),
            *(expectation for router in routers for expectation in router.expectations(expected)),
        ]
        with transaction(connection):
            write_layers(connection, self.run_id, routers)
            most = max(r.top_k for r in routers)
            for step in write_decisions(connection, self.run_id, source=self.called, label=self.label, top_k=most):
                self.tell(step)
            self._end(connection, trace, expectations, routers, started)

    def _write_counted(self, connection: duckdb.DuckDBPyConnection, trace: Trace, started: float) -> None:
        routers, expectations = counted_routers(connection, trace, self.options, self.called)
        self.summary = {"tokens": 0, "generated_tokens": 0, "sequences": 0, "documents": 0, "rows": 0}
        self.summary["notes"] = [NO_DECISIONS, *trace.notes]
        with transaction(connection):
            write_layers(connection, self.run_id, routers)
            self.tell("loads")
            write_counts(connection, self.run_id, self.label)
            self._end(connection, trace, expectations, routers, started)

    def _stage_sequences(self, connection: duckdb.DuckDBPyConnection, trace: Trace) -> None:
        """What an export says of its sequences, or nothing."""
        if trace.sequences is not None:
            connection.register("moescope_sequences", trace.sequences)
        else:
            connection.execute(
                """
                CREATE TEMP TABLE moescope_sequences (
                    sequence_id BIGINT, document_id BIGINT, part INTEGER, label VARCHAR, source VARCHAR, text VARCHAR,
                    content_hash VARCHAR, metadata VARCHAR
                )
                """
            )

    def _lacking(self, connection: duckdb.DuckDBPyConnection) -> list[str]:
        """What no row has."""
        counts = ", ".join(f'count("{column}")' for column in _LACKING)
        found = connection.execute(f"SELECT {counts} FROM moescope_trace").fetchall()[0]
        absent = [said for said, count in zip(_LACKING.values(), found, strict=True) if not count]
        if self.label is not None and "labels" in absent:
            absent.remove("labels")
        return [f"the trace has no {', no '.join(absent)}"] if absent else []

    def _end(
        self,
        connection: duckdb.DuckDBPyConnection,
        trace: Trace,
        expectations: Sequence[Expectation],
        routers: Sequence[Router],
        started: float,
    ) -> None:
        """The ledger and the run's own row, the last thing written."""
        self.tell("ledger")
        full = settle(connection, self.run_id, expectations)
        seconds = time.perf_counter() - started
        summary = {
            **self.summary,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(self.summary["tokens"] / max(seconds, 1e-9), 1),
            "split_documents": 0,
            "single_token_sequences": 0,
            "skipped_records": 0,
            "first_skipped": None,
            "stopped": None,
        }
        settings = {
            "imported_from": self.called,
            "format": trace.format,
            "n_experts": max(r.n_experts for r in routers),
            "top_k": max(r.top_k for r in routers),
            "probabilities": self.options.probabilities,
            "normalize": self.options.normalize,
        }
        row = {
            "run_id": self.run_id,
            "name": self.name,
            "model": self.model or trace.model or "unknown",
            "settings": to_json(settings),
            "versions": to_json(library_versions()),
            "status": "complete" if full else "incomplete",
            "started_at": self.begun,
            "finished_at": datetime.now(UTC).replace(tzinfo=None),
            "summary": to_json(summary),
        }
        names, places = ", ".join(row), ", ".join("?" * len(row))
        connection.execute(f"INSERT INTO runs ({names}) VALUES ({places})", list(row.values()))


def _said(late: int, left_out: list[str]) -> list[str]:
    notes = [f"{late:,} sequences begin after position 0"] if late else []
    return notes + ([f"columns that no table has were left out: {', '.join(left_out)}"] if left_out else [])


def _explained(work: _Import, refused: duckdb.Error) -> MoescopeError:
    text = str(refused)
    if "No space left" in text or "disk full" in text.lower():
        return RunError("the disk is full", found=text, fix="free some space and import again; nothing was written")
    if isinstance(refused, duckdb.ConstraintException):
        return InputError(
            f"{work.store.path} already has a run called {work.name!r}", fix="choose another name (--name)"
        )
    return InputError(
        f"{work.called} cannot be imported", found=text.split("\n\n", maxsplit=1)[0], fix="nothing was written"
    )
