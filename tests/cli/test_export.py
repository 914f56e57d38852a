"""`moescope export`: what it writes and says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from moescope.store.importing.import_trace import import_trace
from moescope.store.store import Store

Cli = Callable[..., Any]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with Store(tmp_path / "runs.duckdb") as store:
        trace = pa.table({"sequence_id": [0], "position": [0], "layer": [2], "experts": [[1]]})
        import_trace(store, trace, name="one", n_experts=4)
    return tmp_path / "runs.duckdb"


def test_the_only_run_is_exported_unnamed(cli: Cli, path: Path, tmp_path: Path) -> None:
    outcome = cli("export", path, "out")
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    assert list((tmp_path / "out" / "routing").rglob("layer=2/*.parquet"))
    found = cli("export", path, "csv", "--format", "csv", "--tables", "loads, routing", "--json").json
    assert (found["run"], found["format"], found["files"]) == ("one", "csv", 3)
    assert found["bytes"] == sum(file.stat().st_size for file in (tmp_path / "csv").iterdir())


def test_refusals_are_one_line(cli: Cli, path: Path, tmp_path: Path) -> None:
    cli("export", tmp_path / "no.duckdb", "out").assert_refused("no store")
    cli("export", path, "out", "--run", "two").assert_refused("no run called 'two'", "one")
    cli("export", path, "out", "--format", "xml").assert_refused("no format")
    cli("export", path, "out", "--tables", "secrets").assert_refused("no table")
    cli("export", path, "a/b").assert_refused("no such folder")
    assert cli("export", path, "out").code == 0
    cli("export", path, "out").assert_refused("--overwrite")
    assert cli("export", path, "out", "--overwrite").code == 0


def test_one_of_several_runs_must_be_named(cli: Cli, path: Path) -> None:
    with Store(path) as store:
        trace = pa.table({"sequence_id": [0], "position": [0], "layer": [2], "experts": [[7]]})
        import_trace(store, trace, name="two", n_experts=4)
    cli("export", path, "out").assert_refused("2 runs", "--run")
    outcome = cli("export", path, "out", "--run", "two")
    assert outcome.code == 0
    assert "run two is incomplete" in outcome.err
