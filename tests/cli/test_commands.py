"""The other commands, and what holds for all: help with an example, versions, stdout for data, stderr for news."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest

from moescope.core.errors import IncompleteError, InputError
from moescope.core.versions import VERSION
from moescope.probes.plan_budget import read_bytes
from moescope.store.store import Store

Cli = Callable[..., Any]
COMMANDS = (
    "plan", "profile", "analyze", "phenomena", "intervene", "sae", "runs", "import", "export", "merge", "dashboard", "doctor",
    "report", "compare",
)  # fmt: skip
PROGRAM = str(Path(sys.executable).parent / "moescope")
HOSTILE = ("[/red]", "[bold]x[/bold]", "\x1b[31mred\x07", "\u202egnp.exe", "a\nb", "日本語 🧪", "<script>", "%s {x}")


def test_version_goes_to_stdout(cli: Cli) -> None:
    outcome = cli("--version")
    assert (outcome.code, outcome.out.strip(), outcome.err) == (0, VERSION, "")


def test_help_lists_every_command(cli: Cli) -> None:
    outcome = cli("--help")
    assert outcome.code == 0
    for command in COMMANDS:
        assert f" {command} " in outcome.out


def test_every_command_of_the_app_is_tested_here() -> None:
    from moescope.cli.app import app

    names = {c.name or getattr(c.callback, "__name__", "") for c in app.registered_commands if not c.hidden}
    names |= {str(g.name) for g in app.registered_groups}
    assert names == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_shows_an_example_and_every_option_described(cli: Cli, command: str) -> None:
    outcome = cli(command, "--help")
    words = " ".join(outcome.out.split())
    assert outcome.code == 0
    assert f"Example: moescope {command}" in words
    assert outcome.err == ""


def test_runs_of_a_store_without_any_say_so_on_stderr(cli: Cli, tmp_path: Path) -> None:
    Store(tmp_path / "runs.duckdb").close()
    outcome = cli("runs", tmp_path / "runs.duckdb")
    assert (outcome.code, outcome.out) == (0, "")
    assert "holds no runs yet" in outcome.err
    assert cli("runs", tmp_path / "runs.duckdb", "--json").json == []


def test_runs_reads_the_store_of_this_folder_by_default(cli: Cli, tmp_path: Path) -> None:
    with Store(tmp_path / "runs.duckdb") as store:
        store.begin_run(name="base", model="demo")
        store.connection.execute("UPDATE runs SET status = 'complete'")
    outcome = cli("runs")
    assert outcome.code == 0
    assert outcome.out.splitlines()[1].split()[:3] == ["base", "complete", "demo"]


def test_run_whose_recorder_was_killed_is_listed_as_incomplete(cli: Cli, tmp_path: Path) -> None:
    Store(tmp_path / "runs.duckdb").close()
    with duckdb.connect(str(tmp_path / "runs.duckdb")) as connection:
        insert = "INSERT INTO runs (run_id, name, model, status, started_at) VALUES (uuid(), 'cut', 'demo', 'running', now())"
        connection.execute(insert)
    (run,) = cli("runs", tmp_path / "runs.duckdb", "--json").json
    assert run["status"] == "incomplete"
    assert "without saying so" in run["summary"]["stopped"]


@pytest.mark.parametrize("name", HOSTILE)
def test_runs_shows_any_name_and_lets_none_steer_the_terminal(cli: Cli, tmp_path: Path, name: str) -> None:
    with Store(tmp_path / "runs.duckdb") as store:
        store.begin_run(name=name, model=name)
    outcome = cli("runs", tmp_path / "runs.duckdb")
    assert outcome.code == 0, outcome.err
    assert all(character.isprintable() or character == "\n" for character in outcome.out)
    if name.isprintable():
        assert name in outcome.out
    (run,) = cli("runs", tmp_path / "runs.duckdb", "--json").json
    assert run["name"] == name


def test_doctor_finds_the_bundled_model_sound_and_leaves_no_file(cli: Cli, tmp_path: Path) -> None:
    outcome = cli("doctor", "demo", "--json")
    assert outcome.code == 0, outcome.out
    found = {check["check"]: check for check in outcome.json}
    assert all(check["ok"] for check in found.values())
    assert VERSION in found["versions"]["found"]
    assert "bit-identical" in found["logits with taps = logits without"]["found"]
    assert "sites full" in found["record two sentences"]["found"]
    assert list(tmp_path.iterdir()) == []


def test_doctor_says_which_check_fails(cli: Cli) -> None:
    outcome = cli("doctor", "./no/such/model", "--json")
    assert outcome.code == 2  # as of profile with this model
    failed = [check for check in outcome.json if not check["ok"]]
    assert [check["check"] for check in failed] == ["load ./no/such/model"]
    assert "no such path" in failed[0]["found"]


def test_doctor_leaves_with_the_code_of_what_it_found(
    cli: Cli, demo_loaded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gaps(live: Any) -> str:
        raise IncompleteError("the ledger has gaps", found="tokens: 3 of 4")

    monkeypatch.setattr("moescope.cli.doctor._recorded", gaps)
    outcome = cli("doctor", "demo", "--json")
    assert outcome.code == 3
    assert [check["check"] for check in outcome.json if not check["ok"]] == ["record two sentences"]


class _Terminal(io.StringIO):
    """Somebody who answers, or presses Ctrl-C."""

    def isatty(self) -> bool:
        return True

    def readline(self, size: int | None = -1, /) -> str:
        if not self.getvalue():
            raise KeyboardInterrupt
        return super().readline()


@pytest.mark.parametrize(("answer", "code", "left"), [("n\n", 0, 1), ("y\n", 0, 0), ("", 130, 1)])
@pytest.mark.parametrize("json", [True, False])
def test_deleting_asks_first(
    answer: str, code: int, left: int, json: bool, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "runs.duckdb"
    with Store(path) as store:
        store.connection.execute(
            "INSERT INTO saes BY NAME SELECT uuid() AS sae_id, 'topk-16' AS name, 'topk' AS architecture, "
            "'blocks.3.hook_mlp_out' AS site, 64 AS d_in, 16 AS d_sae, now() AS created_at, 'saes/topk-16' AS path"
        )
    monkeypatch.setattr(sys, "stdin", _Terminal(answer))
    outcome = cli("sae", "delete", "topk-16", "--store", path, *(["--json"] if json else []))
    assert outcome.code == code, outcome.err
    assert "Delete them?" in outcome.err
    if json and left:
        assert outcome.out.strip() == ""  # input() ends its line there
        assert "topk-16" in outcome.err
    elif json:
        assert outcome.json["autoencoders"] == 1
    if answer == "n\n":
        assert "nothing was deleted" in outcome.err
    with Store(path, read_only=True) as store:
        assert store.fetch("SELECT count(*) FROM saes") == [(left,)]


@pytest.mark.parametrize("text", ["9" * 400, f"{'9' * 400}k", "1" * 308 + "M"])
def test_numbers_without_end_are_refused(text: str, cli: Cli) -> None:
    site = "blocks.3.hook_mlp_out"
    cli("sae", "record", "demo", "--site", site, "--tokens", text).assert_refused("--tokens is a number of tokens")
    with pytest.raises(InputError, match="a budget is a number of bytes"):
        read_bytes(text.replace("k", "KB").replace("M", "MB"))


def _store(path: Path) -> Path:
    with Store(path) as store:
        store.begin_run(name="base", model="demo")
    return path


@pytest.mark.parametrize(
    "words",
    ["runs list runs.duckdb --json", "analyze --list", "intervene edits", "manual", "plan demo --show-config"],
)
def test_reader_that_leaves_early_is_no_error(words: str, tmp_path: Path) -> None:
    """As in `moescope runs --json | head -1`. Exit code 1 would mean a finding over a threshold."""
    _store(tmp_path / "runs.duckdb")
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [PROGRAM, *words.split()], cwd=tmp_path, stdout=write, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_data_is_plain_where_stdout_is_a_file(tmp_path: Path) -> None:
    done = subprocess.run(
        [PROGRAM, "runs", str(_store(tmp_path / "runs.duckdb"))], capture_output=True, text=True, check=True
    )
    assert done.stdout.isprintable() or "\x1b" not in done.stdout
    assert "base" in done.stdout
    assert "\x1b" not in done.stderr


@pytest.mark.slow
def test_ctrl_c_while_recording_ends_with_130_and_an_incomplete_run(tmp_path: Path) -> None:
    words = "The quick brown fox jumps over the lazy dog and does not come back. " * 40
    for number in range(300):
        (tmp_path / f"{number:03}.txt").write_text(words)
    path = tmp_path / "runs.duckdb"
    command = [
        PROGRAM,
        "profile",
        "demo",
        "--data",
        str(tmp_path),
        "--store",
        str(path),
        "--name",
        "cut",
        "--batch-size",
        "2",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        _wait_until(lambda: (tmp_path / "runs.duckdb.wal").exists() or process.poll() is not None)
        time.sleep(2.5)
        assert process.poll() is None, "it ended before it could be interrupted"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert "interrupted" in err
    with Store(path, read_only=True) as store:
        run = store.run("cut")
        assert run.status == "incomplete"
        counts = "SELECT (SELECT count(*) FROM tokens), (SELECT sum(tokens) FROM batches), (SELECT sum(n_tokens) FROM sequences)"
        assert len(set(store.fetch(counts)[0])) == 1


@pytest.mark.slow
def test_dashboard_prints_its_address_and_ends_quietly_on_ctrl_c(tmp_path: Path) -> None:
    path = _store(tmp_path / "runs.duckdb")
    command = [PROGRAM, "dashboard", str(path), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(url, timeout=20) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode in (0, 130), err
    assert out == ""
    assert "Traceback" not in err


def _wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited a minute"
        time.sleep(0.02)
