"""Opening: every way a path can be wrong is told apart, and nothing that is not ours is touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import duckdb
import pytest

from moescope.core.errors import StoreError
from moescope.store.store import Store


def _other_program(path: Path, *statements: str) -> bytes:
    with duckdb.connect(str(path)) as connection:
        for statement in statements:
            connection.execute(statement)
    return path.read_bytes()


def test_missing_file_opened_for_reading_is_refused_and_not_made(path: Path) -> None:
    with pytest.raises(StoreError, match="there is no store at"):
        Store(path, read_only=True)
    assert not path.exists()


def test_missing_folder_is_refused_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no such folder.*mkdir -p .*deep"):
        Store(tmp_path / "deep" / "runs.duckdb")
    assert list(tmp_path.iterdir()) == []


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"is a folder.*runs\.duckdb"):
        Store(tmp_path)


@pytest.mark.parametrize(
    "content", [b"hi", b"hello, this is a text of some length\n" * 9, b"PAR1" + bytes(400), b"SQLite format 3\0"]
)
@pytest.mark.parametrize("read_only", [False, True])
def test_file_of_another_kind_is_refused_and_left_byte_for_byte(path: Path, content: bytes, read_only: bool) -> None:
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"is not a store.*left as it is"):
        Store(path, read_only=read_only)
    assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("read_only", [False, True])
def test_empty_file_is_refused(path: Path, read_only: bool) -> None:
    path.touch()
    with pytest.raises(StoreError):
        Store(path, read_only=read_only)
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    "statements",
    [
        ["CREATE TABLE customers (id INTEGER)", "INSERT INTO customers VALUES (1)"],
        ["CREATE TABLE runs (run_id UUID, name VARCHAR)"],
        ["CREATE SCHEMA sales", "CREATE TABLE sales.orders (id INTEGER)"],
        ["CREATE VIEW report AS SELECT 42 AS answer"],
        ["CREATE TABLE store_info (id INTEGER)"],
        [
            "CREATE TABLE store_info (key VARCHAR, value VARCHAR)",
            "INSERT INTO store_info VALUES ('schema_version', 'two')",
        ],
        [
            "CREATE TABLE store_info (key VARCHAR, value VARCHAR)",
            "INSERT INTO store_info VALUES ('schema_version', '1')",
        ],
    ],
    ids=["table", "our-table-name", "schema", "view", "info-columns", "info-version", "info-application"],
)
@pytest.mark.parametrize("read_only", [False, True])
def test_duckdb_file_of_another_program_is_refused_and_left_as_it_is(
    path: Path, statements: list[str], read_only: bool
) -> None:
    before = _other_program(path, *statements)
    with pytest.raises(StoreError, match="belongs to another program"):
        Store(path, read_only=read_only)
    assert path.read_bytes() == before


def test_other_programs_file_is_named_with_its_tables(path: Path) -> None:
    _other_program(path, "CREATE TABLE customers (id INTEGER)")
    with pytest.raises(StoreError, match=r"belongs to another program.*tables customers.*left as it is"):
        Store(path)


def test_newer_store_is_refused_with_the_version_that_reads_it(path: Path) -> None:
    Store(path).close()
    _other_program(
        path,
        "UPDATE store_info SET value = '99' WHERE key = 'schema_version'",
        "UPDATE store_info SET value = 'moescope 7.3.1' WHERE key = 'created_by'",
    )
    with pytest.raises(StoreError) as refused:
        Store(path)
    assert "schema version 99" in str(refused.value)
    assert "moescope 7.3.1" in str(refused.value)
    assert "install" in str(refused.value)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("read_only", [False, True])
def test_store_cut_off_in_the_middle_is_refused(path: Path, share: float, read_only: bool) -> None:
    with Store(path) as store:
        store.begin_run(name="base")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(StoreError, match=str(path)):
        Store(path, read_only=read_only)


def test_store_with_overwritten_blocks_is_refused(path: Path) -> None:
    Store(path).close()
    content = bytearray(path.read_bytes())
    content[4096:12288] = b"\xff" * 8192
    path.write_bytes(content)
    with pytest.raises(StoreError):
        Store(path)


@pytest.mark.parametrize("read_only", [False, True])
def test_store_held_by_another_process_is_refused_with_its_pid(
    path: Path, held: Callable[..., int], read_only: bool
) -> None:
    Store(path).close()
    pid = held(path, "write")
    with pytest.raises(StoreError, match=rf"is in use.*{pid}"):
        Store(path, read_only=read_only)


def test_store_read_by_another_process_cannot_be_written_but_read(path: Path, held: Callable[..., int]) -> None:
    with Store(path) as store:
        store.begin_run(name="base")
    pid = held(path, "read")
    with pytest.raises(StoreError, match=str(pid)):
        Store(path)
    with Store(path, read_only=True) as first, Store(path, read_only=True) as second:
        assert [run.name for run in first.runs()] == [run.name for run in second.runs()] == ["base"]


def test_store_open_here_in_another_mode_is_refused(path: Path) -> None:
    with Store(path), pytest.raises(StoreError, match="already open in this process"):
        Store(path, read_only=True)
    with Store(path, read_only=True), pytest.raises(StoreError, match="already open in this process"):
        Store(path)


def test_file_is_free_again_after_a_refusal(path: Path) -> None:
    Store(path).close()
    with Store(path), pytest.raises(StoreError):
        Store(path, read_only=True)
    Store(path, read_only=True).close()
    Store(path).close()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StoreError, match="no permission"):
            Store(tmp_path / "runs.duckdb")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_file_that_may_not_be_written_is_refused_but_can_be_read(path: Path) -> None:
    Store(path).close()
    path.chmod(0o400)
    with pytest.raises(StoreError, match=r"no permission.*read_only=True"):
        Store(path)
    with Store(path, read_only=True) as store:
        assert store.runs() == []


_DIES = """
import os, sys
from moescope.store.store import Store
store = Store(sys.argv[1])
run = store.begin_run(name="killed")
store.connection.execute("INSERT INTO batches VALUES (?, 0, 0, 1, 5)", [run.run_id])
store.connection.execute("UPDATE runs SET summary = '{\\"kept\\": 1}' WHERE run_id = ?", [run.run_id])
print("ready", flush=True)
sys.stdin.read()
"""


def test_run_of_a_killed_process_is_incomplete_when_the_store_is_opened_next(path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _DIES, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with Store(path) as store:
        run = store.run("killed")
        assert run.status == "incomplete"
        assert not run.complete
        assert run.info["summary"]["kept"] == 1
        assert "without saying so" in run.info["summary"]["stopped"]
        assert run.rows("batches") == 1, "what was committed is still there"


def test_runs_that_ended_keep_their_status(path: Path) -> None:
    with Store(path) as store:
        for status in ("complete", "incomplete", "failed"):
            store.begin_run(name=status)
            store.connection.execute("UPDATE runs SET status = ?1 WHERE name = ?1", [status])
    with Store(path) as store:
        assert [(run.name, run.status) for run in store.runs()] == [
            (s, s) for s in ("complete", "incomplete", "failed")
        ]


def test_second_store_of_this_process_leaves_a_run_being_recorded_alone(path: Path) -> None:
    with Store(path) as recording:
        run = recording.begin_run(name="base")
        with Store(path) as second:
            assert [other.name for other in second.runs()] == ["base"]
        assert run.status == "running", "it is still being recorded, by this very process"


@pytest.mark.parametrize("name", ["with space", "quo'te\"s", "ünï-日本-🧪", "semi;colon", "per%cent", "-dash"])
def test_any_file_name_works(tmp_path: Path, name: str) -> None:
    with Store(tmp_path / f"{name}.duckdb") as store:
        store.begin_run(name="base")
    with Store(str(tmp_path / f"{name}.duckdb"), read_only=True) as store:
        assert [run.name for run in store.runs()] == ["base"]
