"""Deleting takes every row of a run and nothing of another, at once or not at all, and the next run uses the room."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import duckdb
import pytest

from moescope.core.errors import InputError, RunError
from moescope.store import deleting
from moescope.store.deleting import delete_runs, rows_of_run
from moescope.store.schema import TABLES, Column, Table
from moescope.store.store import Store
from moescope.store.vector_shards import vectors_folder

_SPEC = importlib.util.spec_from_file_location("moescope_tests_every_table", Path(__file__).parent / "every_table.py")
assert _SPEC is not None
assert _SPEC.loader is not None
every_table: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(every_table)

OF_THE_FILE = {"store_info", "saes"}
FIRST, SECOND, THIRD = (str(uuid.UUID(int=n)) for n in (1, 2, 3))


@pytest.fixture
def full(store: Store) -> Store:
    """Three runs with rows in every table, and vectors of two."""
    for run_id, name in ((FIRST, "first"), (SECOND, "second"), (THIRD, "third")):
        every_table.fill(store.connection, run_id, name)
    for run_id in (FIRST, SECOND):
        folder = vectors_folder(store.path, run_id) / "blocks.0.hook_resid_post"
        folder.mkdir(parents=True)
        (folder / "00000.safetensors").write_bytes(bytes(1000))
    return store


def _contents(store: Store) -> dict[str, list[tuple[Any, ...]]]:
    found: dict[str, list[tuple[Any, ...]]] = every_table.contents(store.connection)
    return found


def test_every_table_loses_the_rows_of_the_run_and_keeps_all_others(full: Store) -> None:
    before = _contents(full)
    own_of = {
        "effect_sequences": "SELECT effect_id FROM effects WHERE base_run_id = ?",
        "description_scores": "SELECT description_id FROM descriptions WHERE run_id = ?",
    }
    named = {table: {str(value) for (value,) in full.fetch(query, [FIRST])} for table, query in own_of.items()}
    deleted = full.delete_run("first")
    after = _contents(full)
    assert set(before) == {table.name for table in TABLES}
    for table, rows in before.items():
        own = [row for row in rows if FIRST in map(str, row)]
        if table in named:
            own = [row for row in rows if str(row[0]) in named[table]]
        if table in OF_THE_FILE:
            own = []
        assert own or table in OF_THE_FILE, f"nothing was planted in {table}"
        assert after[table] == [row for row in rows if row not in own], table
        assert deleted.rows.get(table, 0) == len(own), table


def test_every_table_of_the_schema_is_reached() -> None:
    assert {*rows_of_run(), *OF_THE_FILE} == {table.name for table in TABLES}
    assert list(rows_of_run())[-1] == "runs"


def test_table_that_names_no_run_is_a_mistake_not_a_leftover(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = Table("lost", "one row a thing", (Column("thing", "BIGINT", "a thing"),))
    monkeypatch.setattr(deleting, "TABLES", (*TABLES, lost))
    with pytest.raises(RunError, match="rows of lost name no run"):
        rows_of_run()


def test_effect_measured_with_the_run_stays_and_no_longer_names_it(full: Store) -> None:
    full.connection.execute("UPDATE effects SET run_id = ? WHERE base_run_id = ?", [FIRST, SECOND])
    full.delete_run("first")
    query = "SELECT base_run_id::VARCHAR, run_id FROM effects WHERE base_run_id = ?"
    assert full.fetch(query, [SECOND]) == [(SECOND, None)] * 3


def test_vectors_of_the_run_go_and_those_of_others_stay(full: Store) -> None:
    assert full.delete_run("first").vector_bytes == 1000
    assert not vectors_folder(full.path, FIRST).exists()
    assert vectors_folder(full.path, SECOND).exists()
    full.delete_run("second")
    assert not vectors_folder(full.path, SECOND).parent.exists(), "the folder of all goes with the last"
    assert full.delete_run("third").vector_bytes == 0


def test_folder_of_vectors_that_is_a_link_is_not_followed(full: Store, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.mkdir()
    (target / "file").write_text("x")
    vectors_folder(full.path, THIRD).symlink_to(target)
    full.delete_run("third")
    assert (target / "file").exists()


def test_vectors_that_cannot_be_deleted_are_named(full: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("moescope.store.deleting.shutil.rmtree", refuse)
    with pytest.raises(RunError, match=rf"'first' is deleted, but its vectors are not.*{FIRST}"):
        full.delete_run("first")
    assert [run.name for run in full.runs()] == ["second", "third"]


def test_several_runs_go_together_or_not_at_all(full: Store) -> None:
    before = _contents(full)
    first, second = full.run("first"), full.run("second")
    full.connection.execute("UPDATE runs SET status = 'running' WHERE name = 'second'")
    with pytest.raises(InputError, match="'second' is being recorded"):
        delete_runs(full, [first, second])
    full.connection.execute("UPDATE runs SET status = 'complete' WHERE name = 'second'")
    assert {table: sorted(map(str, rows)) for table, rows in _contents(full).items()} == {
        table: sorted(map(str, rows)) for table, rows in before.items()
    }
    assert vectors_folder(full.path, FIRST).exists()
    delete_runs(full, [first, second])
    assert [run.name for run in full.runs()] == ["third"]


def test_run_being_recorded_is_refused(store: Store) -> None:
    run = store.begin_run(name="base")
    with pytest.raises(InputError, match=r"'base' is being recorded.*nothing was deleted"):
        store.delete_run(run)
    assert store.run("base").status == "running"


def test_unknown_and_deleted_runs_are_refused(full: Store) -> None:
    with pytest.raises(InputError, match=r"no run called 'nope'.*first, second, third"):
        full.delete_run("nope")
    run = full.run("first")
    full.delete_run(run)
    with pytest.raises(InputError, match="'first' is no longer in"):
        full.delete_run(run)


def test_store_open_for_reading_is_refused(full: Store) -> None:
    path = full.path
    full.close()
    with Store(path, read_only=True) as store, pytest.raises(InputError, match="open for reading only"):
        store.delete_run("first")


@pytest.mark.parametrize("name", ["quo'te\"s; DROP TABLE runs;--", "🧪 日本\nline two", "a" * 300])
def test_run_of_any_name_is_deleted_and_its_name_is_free_again(store: Store, name: str) -> None:
    for _ in range(3):
        run = store.begin_run(name=name)
        store.connection.execute("INSERT INTO tokens (run_id, token) VALUES (?, 0)", [run.run_id])
        store.connection.execute("UPDATE runs SET status = 'complete'")
        assert store.delete_run(name).rows == {"tokens": 1, "runs": 1}
    assert store.runs() == []


def test_abandoned_run_can_be_deleted(path: Path) -> None:
    Store(path).close()
    with duckdb.connect(str(path)) as connection:
        connection.execute("INSERT INTO runs (run_id, name, status) VALUES (uuid(), 'cut', 'running')")
    with Store(path) as store:
        assert store.delete_run("cut").rows == {"runs": 1}


_KILLED = """
import os, sys
import moescope.store.deleting as module
from moescope.store.store import Store
plain = module._delete
def delete(run, connection):
    plain(run, connection)
    os.kill(os.getpid(), 9)
module._delete = delete
Store(sys.argv[1]).delete_run("first")
"""


def test_killed_while_deleting_the_run_is_still_whole(full: Store) -> None:
    before = _contents(full)
    full.close()
    done = subprocess.run([sys.executable, "-c", _KILLED, str(full.path)], check=False, timeout=60)
    assert done.returncode == -9
    with Store(full.path) as store:
        assert _contents(store) == before
        store.delete_run("first")


def _large(store: Store, name: str) -> str:
    """A run of 300,000 routing rows that do not compress."""
    run = store.begin_run(name=name)
    store.connection.execute(
        """
        INSERT INTO routing
        SELECT ?, i // 4, i % 4, 'mlp', [(hash(i) % 64)::USMALLINT], [random()::FLOAT], random(), random()
        FROM range(300000) AS t(i)
        """,
        [run.run_id],
    )
    store.connection.execute("UPDATE runs SET status = 'complete'")
    store.connection.execute("CHECKPOINT")
    return run.run_id


def test_room_of_a_deleted_run_is_used_by_the_next_without_compacting(store: Store) -> None:
    empty = store.path.stat().st_size
    _large(store, "first")
    one = store.path.stat().st_size
    _large(store, "second")
    two = store.path.stat().st_size
    assert two - one > 0.8 * (one - empty), "a run takes its own room where there is none free"
    used = "SELECT used_blocks FROM pragma_database_size()"
    before = store.fetch(used)[0][0]
    store.delete_run("first")
    assert store.fetch(used)[0][0] < 0.7 * before, "its room is free at once"
    _large(store, "third")
    assert store.path.stat().st_size <= two + 0.1 * (two - one)


def test_sizes_tell_the_large_run_from_the_small_and_sum_up_to_the_file(store: Store) -> None:
    large = _large(store, "large")
    small = store.begin_run(name="small")
    store.connection.execute("UPDATE runs SET status = 'complete'")
    folder = vectors_folder(store.path, small.run_id)
    folder.mkdir(parents=True)
    (folder / "shard").write_bytes(bytes(12345))
    store.connection.execute("CHECKPOINT")
    sizes = store.sizes()
    assert sizes[large].rows == 300_001
    assert sizes[small.run_id].rows == 1
    assert sizes[small.run_id].vector_bytes == sizes[small.run_id].bytes - sizes[small.run_id].table_bytes == 12345
    assert sizes[small.run_id].table_bytes < 0.3 * sizes[large].table_bytes
    used = store.fetch("SELECT used_blocks * block_size FROM pragma_database_size()")[0][0]
    assert 0.8 * used < sum(size.table_bytes for size in sizes.values()) <= used


def test_deleting_while_a_reader_of_this_process_looks_on(full: Store) -> None:
    """A result that is still being read keeps what it saw."""
    reader = full.cursor()
    reader.execute("SELECT name FROM runs ORDER BY name")
    full.delete_run("first")
    assert reader.fetchall() == [("first",), ("second",), ("third",)]
    assert os.path.exists(full.path)
    assert [run.name for run in full.runs()] == ["second", "third"]
