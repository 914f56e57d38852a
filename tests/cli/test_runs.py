"""`moescope runs`: list, delete, compact and upgrade, with every way they refuse."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest

from moescope.cli.runs import in_words
from moescope.store.run import Run
from moescope.store.store import Store
from moescope.store.vector_shards import vectors_folder

Cli = Callable[..., Any]
PROGRAM = str(Path(sys.executable).parent / "moescope")
V1 = Path(__file__).parents[1] / "store" / "v1_schema.sql"
NAMES = ("quo'te", 'dou"ble', "🧪", "line one\nline two", "a" * 300, "-dash", "[bold]x[/bold]")


def _run(store: Store, name: str, rows: int = 10) -> Run:
    run = store.begin_run(name=name, model="demo", summary={"tokens": rows})
    store.connection.execute(
        "INSERT INTO residual SELECT ?, i, 0, random(), [random(), 0, 0], [1, 2, 3] FROM range(?) AS t(i)",
        [run.run_id, rows],
    )
    store.connection.execute("UPDATE runs SET status = 'complete'")
    return run


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store of a large run with vectors and a small one."""
    path = tmp_path / "runs.duckdb"
    with Store(path) as store:
        large = _run(store, "large", 300_000)
        _run(store, "small")
        folder = vectors_folder(path, large.run_id)
        folder.mkdir(parents=True)
        (folder / "shard").write_bytes(bytes(5000))
    return path


def _names(path: Path) -> list[str]:
    with Store(path, read_only=True) as store:
        return [run.name for run in store.runs()]


@pytest.mark.parametrize("command", [("runs",), ("runs", "list")])
def test_list_shows_status_size_and_tokens(cli: Cli, path: Path, command: tuple[str, ...]) -> None:
    outcome = cli(*command, path)
    assert outcome.code == 0, outcome.err
    head, large, small = outcome.out.splitlines()
    assert head.split()[:5] == ["run", "status", "model", "tokens", "about"]
    assert large.split()[:4] == ["large", "complete", "demo", "300,000"]
    assert large.split()[5] == "MB"
    assert small.split()[5] in ("kB", "B")
    assert f"{path}: " in outcome.err
    assert "MB" in outcome.err


def test_list_as_json_has_bytes_of_tables_and_of_vectors(cli: Cli, path: Path) -> None:
    large, small = cli("runs", "list", path, "--json").json
    assert (large["name"], large["vector_bytes"], small["vector_bytes"]) == ("large", 5000, 0)
    assert large["table_bytes"] > 10 * small["table_bytes"] > 0
    assert 0.5 * path.stat().st_size < large["table_bytes"] + small["table_bytes"] <= path.stat().st_size


def test_list_of_a_store_called_like_a_command_needs_the_word_list(cli: Cli, path: Path) -> None:
    path.rename(path.with_name("delete"))
    assert cli("runs", "list", "delete").code == 0
    assert cli("runs", "./delete").code == 0


def test_delete_takes_the_run_its_vectors_and_says_how_much(cli: Cli, path: Path) -> None:
    outcome = cli("runs", "delete", "large", "--store", path, "--yes")
    assert outcome.code == 0, outcome.err
    assert "300,001" in outcome.out
    assert "runs compact" in outcome.out
    assert _names(path) == ["small"]
    assert not path.with_suffix(".vectors").exists()


def test_delete_as_json(cli: Cli, path: Path) -> None:
    told = cli("runs", "delete", "large", "small", "large", "--store", path, "--yes", "--json").json
    assert [run["run"] for run in told["deleted"]] == ["large", "small"]
    assert told["rows"] == {"residual": 300_010, "runs": 2}
    assert told["vector_bytes"] == 5000
    assert _names(path) == []


def test_dry_run_deletes_nothing(cli: Cli, path: Path) -> None:
    before = path.read_bytes()
    (told,) = cli("runs", "delete", "large", "--store", path, "--dry-run", "--json").json
    assert (told["run"], told["rows"], told["vector_bytes"]) == ("large", 300_001, 5000)
    assert cli("runs", "delete", "large", "--store", path, "--dry-run").out.splitlines()[1].split()[0] == "large"
    assert path.read_bytes() == before


def test_delete_without_a_terminal_needs_yes(cli: Cli, path: Path) -> None:
    cli("runs", "delete", "large", "--store", path).assert_refused("--yes", "nothing was deleted")
    assert _names(path) == ["large", "small"]


def test_one_unknown_name_stops_all(cli: Cli, path: Path) -> None:
    cli("runs", "delete", "small", "nope", "--store", path, "--yes").assert_refused("'nope'", "large, small")
    assert _names(path) == ["large", "small"]


def test_store_given_as_a_name_is_understood_and_refused(cli: Cli, path: Path) -> None:
    cli("runs", "delete", path, "small", "--yes").assert_refused("is a file, not a run", "--store")
    assert _names(path) == ["large", "small"]


@pytest.mark.parametrize("name", NAMES)
def test_run_of_any_name_is_listed_and_deleted(cli: Cli, tmp_path: Path, name: str) -> None:
    path = tmp_path / "names.duckdb"
    with Store(path) as store:
        _run(store, name)
    (listed,) = cli("runs", "list", path, "--json").json
    assert listed["name"] == name
    assert all(character.isprintable() or character == "\n" for character in cli("runs", path).out)
    outcome = cli("runs", "delete", "--store", path, "--yes", "--", name)
    assert outcome.code == 0, outcome.err
    assert _names(path) == []


@pytest.mark.parametrize(
    ("answer", "left"), [("y", ["small"]), ("n", ["large", "small"]), ("\x04", ["large", "small"])]
)
def test_delete_asks_on_a_terminal(path: Path, answer: str, left: list[str]) -> None:
    leader, follower = pty.openpty()
    command = [PROGRAM, "runs", "delete", "large", "--store", str(path)]
    process = subprocess.Popen(command, stdin=follower, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.write(leader, f"{answer}\n".encode() if answer != "\x04" else b"\x04")
    out, err = process.communicate(timeout=60)
    os.close(leader)
    os.close(follower)
    assert "large (complete): 300,001 rows" in err
    assert "Delete for good, about" in err
    assert process.returncode == (130 if answer == "\x04" else 0), err
    assert ("nothing was deleted" in err) == (answer == "n")
    assert ("deleted" in out) == (answer == "y")
    assert _names(path) == left


@pytest.mark.parametrize("command", ["delete x --yes --store", "compact", "upgrade"])
def test_missing_store_is_not_made(cli: Cli, tmp_path: Path, command: str) -> None:
    cli("runs", *command.split(), tmp_path / "typo.duckdb").assert_refused("there is no store at")
    assert list(tmp_path.iterdir()) == []


def test_compact_reports_bytes_before_and_after(cli: Cli, path: Path) -> None:
    before = path.stat().st_size
    cli("runs", "delete", "large", "--store", path, "--yes")
    assert path.stat().st_size >= before, "the room is free, the file as large"
    told = cli("runs", "compact", path, "--json").json
    assert told["bytes_before"] >= before
    assert told["bytes_after"] == path.stat().st_size
    assert told["bytes_after"] < 0.5 * before
    assert "saved" in cli("runs", "compact", path).out
    assert _names(path) == ["small"]


def test_held_store_is_refused_with_the_holder(cli: Cli, path: Path) -> None:
    code = "import sys, duckdb; c = duckdb.connect(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        for command in (("list", path), ("compact", path), ("delete", "small", "--yes", "--store", path)):
            cli("runs", *command).assert_refused("is in use", f"process {process.pid}")
    finally:
        process.communicate("", timeout=20)


def test_old_store_is_upgraded_by_the_command_that_the_refusal_names(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "old.duckdb"
    with duckdb.connect(str(path)) as connection:
        connection.execute(V1.read_text(encoding="utf-8"))
    cli("runs", "list", path).assert_refused(f"moescope runs upgrade {path}")
    told = cli("runs", "upgrade", path, "--json").json
    assert told["schema_version"] >= 2
    assert told["upgraded_by"].startswith("moescope ")
    assert (tmp_path / "old.duckdb.v1").exists()
    assert cli("runs", "list", path, "--json").json == []
    assert cli("runs", "upgrade", path).code == 0, "twice is fine"
    assert not (tmp_path / "old.duckdb.v2").exists()


@pytest.mark.parametrize("command", ["list", "delete", "compact", "upgrade"])
def test_help_shows_an_example(cli: Cli, command: str) -> None:
    outcome = cli("runs", command, "--help")
    assert outcome.code == 0
    assert f"Example: moescope runs {command}" in " ".join(outcome.out.split())


def test_help_of_the_group_lists_its_commands(cli: Cli) -> None:
    out = cli("runs", "--help").out
    for command in ("list", "delete", "compact", "upgrade"):
        assert f" {command} " in out
    assert "Example: moescope runs" in out


@pytest.mark.parametrize(
    ("size", "words"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (5_250_000, "5.2 MB"), (7 * 10**15, "7000.0 TB")]
)
def test_bytes_in_words(size: int, words: str) -> None:
    assert in_words(size) == words
