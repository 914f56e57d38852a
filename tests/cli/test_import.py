"""`moescope import`: what it says, where it says it, and its exit codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moescope.cli.import_ import read_layers
from moescope.core.errors import InputError
from moescope.store.store import Store

Cli = Callable[..., Any]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    rows = [{"sequence_id": 0, "position": p, "layer": 3, "experts": [p, p + 1]} for p in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "trace.parquet")
    return tmp_path / "trace.parquet"


def test_a_trace_becomes_a_run_named_after_its_file(cli: Cli, trace: Path, tmp_path: Path) -> None:
    outcome = cli("import", trace, "--n-experts", 8, "--model", "mine")
    assert outcome.code == 0, outcome.err
    assert "complete" in outcome.out
    assert "note: the trace has no weights" in outcome.err
    with Store(tmp_path / "runs.duckdb", read_only=True) as store:
        assert store.run("trace").model == "mine"
        assert store.run("trace").rows("routing") == 4


def test_json_is_all_that_stdout_holds(cli: Cli, trace: Path) -> None:
    found = cli("import", trace, "--n-experts", 8, "--store", "other.duckdb", "--name", "x", "--json").json
    assert (found["run"], found["status"], found["tokens"], found["rows"]) == ("x", "complete", 4, 4)
    assert found["notes"]


def test_gaps_are_told_and_exit_with_3(cli: Cli, trace: Path) -> None:
    outcome = cli("import", trace, "--n-experts", 4)
    assert outcome.code == 3
    assert "invalid: blocks.3.mlp.hook_expert_indices" in outcome.err
    assert "the first is row 3" in outcome.err
    assert "incomplete" in outcome.out


def test_refusals_are_one_line(cli: Cli, trace: Path, tmp_path: Path) -> None:
    cli("import", trace).assert_refused("--n-experts")
    cli("import", tmp_path / "no.csv").assert_refused("there is no file")
    cli("import", trace, "--n-experts", 8, "--format", "xml").assert_refused("no format")
    cli("import", trace, "--n-experts", 8, "--layers", "a-b").assert_refused("--layers cannot be")
    refused = cli("import", trace, "--n-experts", 0)
    assert refused.code == 2
    assert "--n-experts" in refused.err
    assert cli("import", trace, "--n-experts", 8).code == 0
    cli("import", trace, "--n-experts", 8).assert_refused("already has a run")


def test_layers_of_an_array_are_named(cli: Cli, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.argsort(np.random.default_rng(0).random((5, 3, 8)), axis=2)[:, :, :2])
    assert cli("import", tmp_path / "a.npy", "--n-experts", 8, "--layers", "1,4-5").code == 0
    with Store(tmp_path / "runs.duckdb", read_only=True) as store:
        assert store.fetch("SELECT layer FROM layers ORDER BY layer") == [(1,), (4,), (5,)]


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1,,2", "1-2-3", "99999999"])
def test_layers_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--layers cannot be"):
        read_layers(text)
