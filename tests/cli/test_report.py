"""`moescope report`: files, thresholds as exit codes, and the check of a report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moescope as ms

Cli = Callable[..., Any]
PASSES = "rules:\n  - {analysis: nll, metric: mean NLL, where: {label: all}, max: 1000}\n"
FAILS = "rules:\n  - {analysis: nll, metric: mean NLL, where: {label: all}, max: 0.001}\n"
NOTHING = "rules:\n  - {analysis: nll, metric: mean NLL, where: {label: klingon}, max: 1000}\n"


@pytest.fixture(scope="module")
def recorded(demo_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of the demo on two texts, with tokens alone: reports of them are quick."""
    path = tmp_path_factory.mktemp("report") / "runs.duckdb"
    texts = [{"text": "The quick brown fox.", "label": "a"}, {"text": "def add(a, b): return a", "label": "b"}]
    with ms.Store(path) as store:
        for name in ("base", "again"):
            ms.record(demo_model, texts, store, name=name, probes=("tokens",), progress=False)
    return path


def _file(folder: Path, text: str) -> Path:
    path = folder / "limits.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_report_is_written_and_then_holds(cli: Cli, recorded: Path, tmp_path: Path) -> None:
    outcome = cli("report", recorded, "base", "--output", "r.html", "--json")
    assert outcome.code == 0, outcome.err
    told = outcome.json
    assert told["bytes"] == (tmp_path / "r.html").stat().st_size
    assert [run["name"] for run in told["runs"]] == ["base"]
    assert {"nll"} <= {entry["analysis"] for entry in told["sections"]}
    assert {entry["analysis"] for entry in told["findings"]} == {entry["analysis"] for entry in told["sections"]}
    checked = cli("report", "--check", "r.html", "--json")
    assert (checked.code, checked.json["holds"], checked.json["differences"]) == (0, True, [])


def test_report_changed_by_hand_is_found_out(cli: Cli, recorded: Path, tmp_path: Path) -> None:
    assert cli("report", recorded, "base", "--output", "r.html").code == 0
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    at = text.index("<h2>", text.index("id='nll'"))
    digit = next(place for place in range(at + 4, len(text)) if text[place].isdigit())
    (tmp_path / "r.html").write_text(
        text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :], encoding="utf-8"
    )
    outcome = cli("report", "--check", "r.html")
    assert outcome.code == 1
    assert "nll" in outcome.out
    assert "title" in outcome.out


def test_file_that_is_no_report_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "x.html").write_text("<p>hello</p>")
    cli("report", "--check", "x.html").assert_refused("no report that can be checked")
    cli("report", "--check", "none.html").assert_refused("there is no file")


@pytest.mark.parametrize(("rules", "code", "status"), [(PASSES, 0, "pass"), (FAILS, 1, "fail"), (NOTHING, 2, "error")])
def test_thresholds_become_the_exit_code_and_no_file(
    cli: Cli, recorded: Path, tmp_path: Path, rules: str, code: int, status: str
) -> None:
    limits = _file(tmp_path, rules)
    outcome = cli("report", recorded, "base", "--thresholds", limits, "--json")
    assert (outcome.code, [one["status"] for one in outcome.json["thresholds"]]) == (code, [status])
    assert [path.name for path in tmp_path.iterdir()] == ["limits.yaml"]
    told = cli("report", recorded, "base", "--thresholds", limits)
    assert (told.code, told.err.count("Of 1 thresholds")) == (code, 1)


def test_thresholds_stand_in_the_report_and_are_checked_too(cli: Cli, recorded: Path, tmp_path: Path) -> None:
    outcome = cli("report", recorded, "base", "--thresholds", _file(tmp_path, FAILS), "--output", "r.html")
    assert outcome.code == 1
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "✗ FAIL" in text
    (tmp_path / "r.html").write_text(text.replace("✗ FAIL", "✓ pass"), encoding="utf-8")
    outcome = cli("report", "--check", "r.html")
    assert outcome.code == 1
    assert "thresholds" in outcome.out


def test_dry_run_lists_and_writes_nothing(cli: Cli, recorded: Path, tmp_path: Path) -> None:
    outcome = cli("report", recorded, "base", "--dry-run", "--json")
    assert outcome.code == 0
    assert "nll" in {entry["analysis"] for entry in outcome.json["sections"]}
    without = {entry["analysis"]: entry["command"] for entry in outcome.json["left_out"]}
    assert without["load"].startswith(f"moescope profile demo --store {recorded}")
    assert "routing" in without["load"]
    assert list(tmp_path.iterdir()) == []


def test_run_of_another_store_is_named_with_its_file(cli: Cli, recorded: Path, tmp_path: Path) -> None:
    (tmp_path / "other.duckdb").write_bytes(recorded.read_bytes())
    with ms.Store(tmp_path / "other.duckdb") as store:
        store.connection.execute("UPDATE runs SET run_id = uuid() WHERE name = 'again'")
        store.connection.execute("UPDATE runs SET name = 'elsewhere' WHERE name = 'again'")
        ids = {run.name: run.run_id for run in store.runs()}
    outcome = cli("report", recorded, "base", "other.duckdb:elsewhere", "--output", "r.html", "--json")
    assert outcome.code == 0, outcome.err
    assert [run["run_id"] for run in outcome.json["runs"]][1] == ids["elsewhere"]
    cli("report", recorded, "other.duckdb:nobody").assert_refused("no run called 'nobody'")


def test_wrong_calls_are_refused(cli: Cli, recorded: Path, tmp_path: Path) -> None:
    cli("report").assert_refused("no store is named")
    cli("report", recorded).assert_refused("which runs?", "base, again")
    cli("report", recorded, "base", "base").assert_refused("named twice")
    cli("report", recorded, "base", "--output", "r.pdf").assert_refused(".html or .md")
    cli("report", recorded, "base", "--output", "no/r.html").assert_refused("no such folder")
    cli("report", recorded, "base", "--check", "r.html").assert_refused("--check reads a report")
    cli("report", recorded, "base", "--thresholds", _file(tmp_path, "rules: 3\n")).assert_refused("limits.yaml, line 1")


def test_incomplete_run_is_reported_and_exits_with_3(cli: Cli, recorded: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.duckdb").write_bytes(recorded.read_bytes())
    with ms.Store(tmp_path / "cut.duckdb") as store:
        store.connection.execute("UPDATE runs SET status = 'incomplete' WHERE name = 'base'")
    outcome = cli("report", "cut.duckdb", "base", "--output", "r.html")
    assert outcome.code == 3
    assert "not complete: base" in outcome.err
    assert "INCOMPLETE RUN" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_colons_in_paths_and_names_of_runs_are_found(cli: Cli, recorded: Path, tmp_path: Path) -> None:
    (tmp_path / "o:p.duckdb").write_bytes(recorded.read_bytes())
    with ms.Store(tmp_path / "o:p.duckdb") as store:
        store.connection.execute("UPDATE runs SET run_id = uuid(), name = 'a:b' WHERE name = 'again'")
    outcome = cli("report", recorded, "o:p.duckdb:a:b", "--output", "r.html", "--json")
    assert outcome.code == 0, outcome.err
    assert [run["name"] for run in outcome.json["runs"]] == ["a:b"]


def test_counts_are_told_in_plain_words_and_json_has_the_lists(cli: Cli, recorded: Path) -> None:
    told = dict(line.split("  ", 1) for line in cli("report", recorded, "base").out.splitlines())
    data = cli("report", recorded, "base", "--json").json
    for label, key in (("sections", "sections"), ("findings", "findings"), ("left out", "left_out")):
        assert told[label].strip() == str(len(data[key]))
    assert not [key for key in data if "number" in key]


def test_whole_of_routing_takes_no_flag_that_it_would_ignore(cli: Cli, recorded: Path) -> None:
    for flags in (("--param", "segment=3"), ("--rows", "3"), ("--format", "csv")):
        cli("analyze", recorded, "--run", "base", "--all", *flags).assert_refused(flags[0], "--analysis")


def test_text_between_colons_stays_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    from moescope.cli.app import _told

    assert _told("no run called ':warning:' [bold]", 2) == 2
    assert capsys.readouterr().err == "error: no run called ':warning:' [bold]\n"


def test_profile_against_an_incomplete_baseline_exits_with_3(cli: Cli, recorded: Path, tmp_path: Path) -> None:
    (tmp_path / "half.duckdb").write_bytes(recorded.read_bytes())
    with ms.Store(tmp_path / "half.duckdb") as store:
        store.connection.execute("UPDATE runs SET status = 'incomplete' WHERE name = 'base'")
    rule = "{analysis: nll, metric: mean NLL, where: {label: all}, baseline: base, max_change: 100}"
    (tmp_path / "text.txt").write_text("The quick brown fox.")
    outcome = cli("profile", "demo", "--store", "half.duckdb", "--name", "next", "--data", "text.txt", "--probe", "tokens",
                  "--thresholds", _file(tmp_path, f"rules:\n  - {rule}\n"))  # fmt: skip
    assert outcome.code == 3, outcome.err
    assert "not complete: base" in outcome.err
