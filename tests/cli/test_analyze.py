"""`moescope analyze`: what it prints, saves and refuses."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from moescope.core.analysis import analyses
from moescope.store.importing.import_trace import import_trace
from moescope.store.store import Store

Cli = Callable[..., Any]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store with one run: expert 1 takes three of four decisions."""
    with Store(tmp_path / "runs.duckdb") as store:
        rows = {"sequence_id": [0] * 4, "position": [0, 1, 2, 3], "layer": [2] * 4, "experts": [[1], [1], [1], [0]]}
        run = import_trace(store, pa.table(rows), name="one", n_experts=2)
        store.connection.execute("UPDATE runs SET status = 'complete' WHERE run_id = ?", [run.run_id])
    return tmp_path / "runs.duckdb"


def test_a_table_says_finding_numbers_and_definition(cli: Cli, path: Path) -> None:
    outcome = cli("analyze", path, "--analysis", "load")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0].startswith("L2·E1 is the busiest expert, with 1.50× its fair share")
    assert lines[1] == "n = 4 decisions · one"
    assert "What it shows" in outcome.out
    assert "0.75" in outcome.out
    short = cli("analyze", path, "--analysis", "load", "--rows", "1").out
    assert "2 rows in all" in short


def test_csv_and_json_are_data_alone(cli: Cli, path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(cli("analyze", path, "--analysis", "load", "--format", "csv").out)))
    assert [(row["expert"], float(row["share"])) for row in rows] == [("0", 0.25), ("1", 0.75)]
    found = cli("analyze", path, "--analysis", "load", "--json").json
    assert (found["name"], found["n"], len(found["table"])) == ("load", 4, 2)


def test_results_are_saved_in_the_format_of_the_ending(cli: Cli, path: Path, tmp_path: Path) -> None:
    for ending in ("html", "csv", "parquet", "json"):
        outcome = cli("analyze", path, "--analysis", "load", "--output", f"load.{ending}")
        assert outcome.code == 0, outcome.err
        assert (tmp_path / f"load.{ending}").stat().st_size > 0
        assert f"saved load.{ending}" in outcome.err


def test_all_writes_the_routing_part_of_a_report(cli: Cli, path: Path, tmp_path: Path) -> None:
    outcome = cli("analyze", path, "--all", "--output", "r.html", "--json")
    assert outcome.code == 0, outcome.err
    page = (tmp_path / "r.html").read_text()
    assert outcome.json == {"report": "r.html", "bytes": len(page.encode())}
    assert "<section id='load'>" in page
    assert "<section id='nll'>" not in page
    assert "Not in this report" in page


def test_the_list_names_every_analysis_with_its_parameters(cli: Cli) -> None:
    outcome = cli("analyze", "--list")
    for entry in analyses:
        assert f"\n{entry.name}\n" in f"\n{outcome.out}"
        for name in entry.parameters:
            assert f"--param {name}=" in outcome.out
    assert [entry["name"] for entry in cli("analyze", "--list", "--json").json] == analyses.names()


def test_parameters_reach_the_analysis(cli: Cli, path: Path) -> None:
    found = cli("analyze", path, "--analysis", "repetition", "--param", "seed = 3", "--json").json
    assert found["parameters"]["seed"] == 3


def test_refusals_are_one_line(cli: Cli, path: Path, tmp_path: Path) -> None:
    cli("analyze").assert_refused("no store is named")
    cli("analyze", path).assert_refused("--analysis", "--all")
    cli("analyze", path, "--all", "--analysis", "load").assert_refused("only one")
    cli("analyze", path, "--analysis", "laod").assert_refused("no analysis called 'laod'", "'load'")
    cli("analyze", path, "--analysis", "load", "--param", "x=1").assert_refused("no parameter 'x'")
    cli("analyze", path, "--analysis", "load", "--param", "x").assert_refused("name=value")
    cli("analyze", path, "--analysis", "load", "--format", "xml").assert_refused("no format 'xml'", "csv")
    cli("analyze", path, "--analysis", "load", "--output", "a.xls").assert_refused(".parquet")
    cli("analyze", path, "--analysis", "load", "--run", "two").assert_refused("no run called 'two'")
    cli("analyze", path, "--analysis", "load", "--run", "one", "--run", "one").assert_refused("1 run")
    cli("analyze", path, "--analysis", "load,load", "--output", "a.html").assert_refused("one analysis")
    cli("analyze", tmp_path / "no.duckdb", "--analysis", "load").assert_refused("no store")
    assert {file.name for file in tmp_path.iterdir()} == {"runs.duckdb"}


def test_an_incomplete_run_is_analysed_only_when_asked(cli: Cli, path: Path) -> None:
    with Store(path) as store:
        store.connection.execute("UPDATE runs SET status = 'incomplete'")
    for asked in (("--analysis", "load"), ("--all",)):
        outcome = cli("analyze", path, *asked)
        assert outcome.code == 3
        assert "is not complete" in outcome.err
    outcome = cli("analyze", path, "--analysis", "load", "--allow-incomplete")
    assert outcome.code == 0
    assert "INCOMPLETE RUN" in outcome.out
