"""`moescope compare`: differences of runs on the command line."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moescope as ms

Cli = Callable[..., Any]
TEXTS = ["The quick brown fox jumps.", "Good day to you all."]


@pytest.fixture(scope="module")
def compared(demo_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compare") / "runs.duckdb"
    cut = ms.Intervention([ms.edits.Ablate(layer=3, experts=list(range(12)))])
    with ms.Store(path) as store:
        for name, edits in (("base", None), ("cut", cut), ("third", None)):
            ms.record(
                demo_model, TEXTS, store, name=name, probes=("tokens", "routing"), intervention=edits, progress=False
            )
    return path


def _mean(path: Path, name: str) -> float:
    with ms.Store(path, read_only=True) as store:
        query = "SELECT avg(nll::DOUBLE) FROM tokens WHERE run_id = $run AND nll IS NOT NULL"
        return float(store.run(name).sql(query).fetchall()[0][0])


def test_differences_are_those_of_the_records(cli: Cli, compared: Path) -> None:
    outcome = cli("compare", compared, "base", "cut", "--json")
    assert outcome.code == 0, outcome.err
    (row,) = [r for r in outcome.json["measures"]["table"] if r["metric"] == "mean NLL"]
    assert row["value"] == pytest.approx(_mean(compared, "cut") - _mean(compared, "base"))
    assert outcome.json["configuration"][0]["setting"] == "intervention"


def test_table_tells_both_runs_and_what_changed(cli: Cli, compared: Path) -> None:
    outcome = cli("compare", compared, "base", "cut")
    assert outcome.code == 0
    assert "What changed in configuration" in outcome.out
    assert "Removing 12 " in outcome.out
    assert "mean NLL, nats" in outcome.out


def test_run_compared_with_its_like_differs_in_nothing(cli: Cli, compared: Path) -> None:
    outcome = cli("compare", compared, "base", "third", "--json")
    assert {row["value"] for row in outcome.json["measures"]["table"]} == {0.0}


def test_three_runs_stand_side_by_side(cli: Cli, compared: Path) -> None:
    board = cli("compare", compared, "base", "cut", "third", "--json").json["leaderboard"]
    told = {row["run"]: row["value"] for row in board if row["metric"] == "mean NLL"}
    assert told == pytest.approx({name: _mean(compared, name) for name in ("base", "cut", "third")})


@pytest.mark.parametrize(("bound", "code"), [("max_rise: 100", 0), ("max_change: 0", 1)])
def test_change_over_a_threshold_is_the_exit_code(
    cli: Cli, compared: Path, tmp_path: Path, bound: str, code: int
) -> None:
    text = f"rules:\n  - {{analysis: nll, metric: mean NLL, where: {{label: all}}, {bound}}}\n"
    (tmp_path / "limits.yaml").write_text(text)
    outcome = cli("compare", compared, "base", "cut", "--thresholds", "limits.yaml")
    assert outcome.code == code, outcome.err + outcome.out


def test_one_run_is_no_comparison(cli: Cli, compared: Path) -> None:
    cli("compare", compared, "base").assert_refused("two runs or more", "moescope report")
    cli("compare", compared, "base", "nobody").assert_refused("no run called 'nobody'")
    cli("compare", compared, "base", "cut", "--output", "x.txt").assert_refused(".html or .md")


@pytest.fixture(scope="module")
def oddly_named(compared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs, called as columns of the table of measures are."""
    path = tmp_path_factory.mktemp("odd") / "runs.duckdb"
    path.write_bytes(compared.read_bytes())
    with ms.Store(path) as store:
        for old, new in (("base", "beyond"), ("cut", "unit"), ("third", "controls")):
            store.connection.execute("UPDATE runs SET name = ? WHERE name = ?", [new, old])
    return path


@pytest.mark.parametrize("names", [("beyond", "unit"), ("unit", "controls"), ("controls", "beyond")])
def test_runs_called_as_columns_lose_none(cli: Cli, oddly_named: Path, names: tuple[str, str]) -> None:
    outcome = cli("compare", oddly_named, *names)
    assert outcome.code == 0, outcome.err
    (head,) = [line.split() for line in outcome.out.splitlines() if line.startswith("measure")]
    assert tuple(head[1:3]) == names
    assert "mean NLL, nats" in outcome.out


def test_json_keeps_the_values_of_every_run(cli: Cli, compared: Path, tmp_path: Path) -> None:
    (tmp_path / "other.duckdb").write_bytes(compared.read_bytes())
    with ms.Store(tmp_path / "other.duckdb") as store:
        (old,) = [run.run_id for run in store.runs() if run.name == "base"]
        new = str(uuid.uuid4())
        tables = """
            SELECT table_name
            FROM information_schema.tables t
            JOIN information_schema.columns c USING (table_schema, table_name)
            WHERE c.column_name = 'run_id' AND t.table_type = 'BASE TABLE'
        """
        for (table,) in store.fetch(tables):
            store.connection.execute(f"UPDATE {table} SET run_id = ? WHERE run_id = ?", [new, old])
        store.connection.execute("UPDATE runs SET seed = 7 WHERE run_id = ?", [new])
    told = cli("compare", compared, "base", "other.duckdb:base", "--json").json
    assert told["runs"] == ["base (runs.duckdb)", "base (other.duckdb)"]
    (seed,) = [row for row in told["configuration"] if row["setting"] == "seed"]
    assert (len(seed["values"]), seed["values"][1]) == (2, "7")
    assert seed["values"][0] != "7"


def test_incomplete_baseline_exits_with_3(cli: Cli, compared: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.duckdb"
    path.write_bytes(compared.read_bytes())
    with ms.Store(path) as store:
        store.connection.execute("UPDATE runs SET status = 'incomplete' WHERE name = 'third'")
    rule = "{analysis: nll, metric: mean NLL, where: {label: all}, baseline: third, max_change: "
    for bound, code in ((100, 3), (0, 1)):
        (tmp_path / "limits.yaml").write_text(f"rules:\n  - {rule}{bound}}}\n")
        for command in (("compare", path, "base", "cut"), ("report", path, "cut")):
            outcome = cli(*command, "--thresholds", "limits.yaml")
            assert outcome.code == code, outcome.err
            assert "not complete: third" in outcome.err
