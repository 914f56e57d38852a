"""A store of an older version opens as a new one: nothing lost, a copy kept, whole whatever stops the upgrade."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest

from moescope.core.errors import StoreError
from moescope.store.migrations.steps import STEPS
from moescope.store.schema import SCHEMA_VERSION
from moescope.store.store import Store

HERE = Path(__file__).parent
_SPEC = importlib.util.spec_from_file_location("moescope_tests_every_table", HERE / "every_table.py")
assert _SPEC is not None
assert _SPEC.loader is not None
every_table: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(every_table)

RUNS = {str(uuid.UUID(int=1)): "first", str(uuid.UUID(int=2)): "sec'ond 🧪"}
# What a step fills in by itself; every other new column is null.
COMPUTED = {
    ("expert_partials", "neurons"): lambda _: 0,
    ("expert_partials", "active"): lambda _: 0,
    ("expert_partials", "zeros"): lambda _: 0,
    ("heads", "block"): lambda _: "attn",
    ("activations", "shard"): lambda row: row["rows"],  # planted: path and rows both grow with the shard's number
}


def _version_1(path: Path) -> dict[str, list[dict[str, Any]]]:
    """A file as version 1 made it, with rows of two runs in every table; gives them by column."""
    with duckdb.connect(str(path)) as connection:
        connection.execute((HERE / "v1_schema.sql").read_text(encoding="utf-8"))
        for run_id, name in RUNS.items():
            every_table.fill(connection, run_id, name)
        # As recording would have it: several shards of one site.
        connection.execute("UPDATE activations SET site = 'blocks.0.hook_resid_post'")
        return _rows(connection)


def _rows(connection: duckdb.DuckDBPyConnection) -> dict[str, list[dict[str, Any]]]:
    names = every_table.columns(connection)
    return {
        table: [dict(zip(names[table], row, strict=True)) for row in rows]
        for table, rows in every_table.contents(connection).items()
    }


def _version(path: Path) -> str:
    with duckdb.connect(str(path), read_only=True) as connection:
        query = "SELECT value FROM store_info WHERE key = 'schema_version'"
        return str(connection.execute(query).fetchall()[0][0])


@pytest.fixture
def old(path: Path) -> dict[str, list[dict[str, Any]]]:
    return _version_1(path)


def test_every_row_is_there_and_new_columns_are_null_or_computed(
    path: Path, old: dict[str, list[dict[str, Any]]]
) -> None:
    assert min(len(rows) for rows in old.values()) >= 2
    with Store(path) as store:
        new = _rows(store.connection)
    for table, rows in old.items():
        if table == "store_info":
            continue
        assert len(new[table]) == len(rows), table
        for before, after in zip(rows, new[table], strict=True):
            assert {key: after[key] for key in before} == before, table
            for column in set(after) - set(before):
                expected = COMPUTED.get((table, column), lambda _: None)(before)
                assert after[column] == expected, f"{table}.{column}"


def test_an_upgraded_file_is_made_like_a_fresh_one(path: Path, old: object, tmp_path: Path) -> None:
    with Store(path) as upgraded, Store(tmp_path / "fresh.duckdb") as fresh:
        assert every_table.shape(upgraded.connection) == every_table.shape(fresh.connection)
        notes = [dict(s.fetch("SELECT key, value FROM store_info")) for s in (upgraded, fresh)]
    assert notes[0]["schema_version"] == notes[1]["schema_version"] == str(SCHEMA_VERSION)
    assert notes[0]["views"] == notes[1]["views"]
    assert notes[0]["created_by"] == "moescope 0.1.0"
    assert notes[0]["upgraded_by"].startswith("moescope ")


def test_the_frozen_schema_is_an_older_one(path: Path, old: object, tmp_path: Path) -> None:
    """Or the tests here would compare a file with itself."""
    with duckdb.connect(str(path)) as connection, Store(tmp_path / "fresh.duckdb") as fresh:
        assert every_table.shape(connection) != every_table.shape(fresh.connection)


def test_file_between_the_versions_is_upgraded_too(path: Path, tmp_path: Path) -> None:
    """For a while files with the new columns still called themselves version 1."""
    _version_1(path)
    with duckdb.connect(str(path)) as connection:
        connection.execute("ALTER TABLE expert_partials ADD COLUMN neurons BIGINT")
        connection.execute("ALTER TABLE expert_partials ADD COLUMN active BIGINT")
        connection.execute("ALTER TABLE expert_partials ADD COLUMN zeros BIGINT")
        connection.execute("UPDATE expert_partials SET neurons = 64, active = 9, zeros = 1")
        connection.execute("ALTER TABLE activations ADD COLUMN shard INTEGER")
        connection.execute("ALTER TABLE activations ADD COLUMN tokens BIGINT")
        connection.execute("UPDATE activations SET shard = 7, tokens = 5")
    with Store(path) as store, Store(tmp_path / "fresh.duckdb") as fresh:
        assert every_table.shape(store.connection) == every_table.shape(fresh.connection)
        assert set(store.fetch("SELECT neurons, active, zeros FROM expert_partials")) == {(64, 9, 1)}
        assert set(store.fetch("SELECT shard, tokens FROM activations")) == {(7, 5)}


def test_there_is_a_step_from_every_version_to_the_next() -> None:
    assert list(STEPS) == list(range(1, SCHEMA_VERSION))


def test_old_file_is_kept_byte_for_byte_and_said_to_be(
    path: Path, old: object, caplog: pytest.LogCaptureFixture
) -> None:
    path.chmod(0o640)
    before = path.read_bytes()
    with caplog.at_level(logging.WARNING):
        Store(path).close()
    copy = path.with_name("runs.duckdb.v1")
    assert copy.read_bytes() == before
    assert copy.stat().st_mode & 0o777 == 0o640
    assert sorted(p.name for p in path.parent.iterdir()) == ["runs.duckdb", "runs.duckdb.v1"]
    assert "runs.duckdb.v1" in caplog.text
    assert f"from schema version 1 to {SCHEMA_VERSION}" in caplog.text


def test_copy_of_another_file_is_not_overwritten_and_the_same_is_not_made_twice(path: Path, old: object) -> None:
    before = path.read_bytes()
    precious = path.with_name("runs.duckdb.v1")
    precious.write_bytes(b"somebody's")
    path.with_name("runs.duckdb.v1.2").write_bytes(before)
    Store(path).close()
    assert precious.read_bytes() == b"somebody's"
    assert path.with_name("runs.duckdb.v1.2").read_bytes() == before
    assert not path.with_name("runs.duckdb.v1.3").exists()


def test_run_begun_after_the_upgrade_works_beside_the_old_ones(path: Path, old: object) -> None:
    with Store(path) as store:
        run = store.begin_run(name="new", model="demo")
        insert = "INSERT INTO routing VALUES (?, 0, 3, 'mlp', [5, 1], [0.75, 0.25], 0.1, 0.2)"
        store.connection.execute(insert, [run.run_id])
        assert run.table("decisions").fetchall() == [(0, 3, "mlp", 0, 5, 0.75), (0, 3, "mlp", 1, 1, 0.25)]
        store.delete_run("first")
        assert {r.name for r in store.runs()} == {"new", "sec'ond 🧪"}


def test_demo_records_into_an_upgraded_store(path: Path, old: object, demo_model: Any) -> None:
    import moescope as ms

    with Store(path) as store:
        corpus = ms.Corpus.load(["The quick brown fox.", "def add(a, b): return a + b"])
        run = ms.record(demo_model, corpus, store, name="new", progress=False)
        assert run.complete
        assert run.rows("expert_partials") > 0
        assert run.rows("decisions") > 0
        assert len(store.runs()) == 3


def test_old_store_opened_for_reading_says_how_to_upgrade_and_stays(path: Path, old: object) -> None:
    before = path.read_bytes()
    with pytest.raises(
        StoreError, match=r"schema version 1, which must be upgraded.*moescope runs upgrade .*Store\(path\)"
    ):
        Store(path, read_only=True)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_newer_store_names_who_wrote_it_last(path: Path) -> None:
    Store(path).close()
    with duckdb.connect(str(path)) as connection:
        connection.execute("UPDATE store_info SET value = '99' WHERE key = 'schema_version'")
        connection.execute("INSERT INTO store_info VALUES ('upgraded_by', 'moescope 8.0.1')")
    before = path.read_bytes()
    for read_only in (False, True):
        with pytest.raises(StoreError, match=r"schema version 99.*install moescope 8\.0\.1 or later"):
            Store(path, read_only=read_only)
    assert path.read_bytes() == before


@pytest.mark.parametrize("version", ["0", "-1", "1.5", "two", "", "9" * 40])
def test_version_that_is_none_is_refused_and_the_file_left(path: Path, version: str) -> None:
    _version_1(path)
    with duckdb.connect(str(path)) as connection:
        connection.execute("UPDATE store_info SET value = ? WHERE key = 'schema_version'", [version])
    before = path.read_bytes()
    with pytest.raises(StoreError, match="schema version"):
        Store(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["TABLE", "VIEW"])
def test_name_in_the_way_of_a_view_stops_the_upgrade_with_what_to_do(path: Path, kind: str) -> None:
    rows = _version_1(path)
    with duckdb.connect(str(path)) as connection:
        connection.execute(f"CREATE {kind} decisions AS SELECT 42 AS mine")
    with pytest.raises(StoreError, match=rf"'decisions' is needed.*ALTER {kind} decisions RENAME TO my_decisions"):
        Store(path)
    assert _version(path) == "1"
    with duckdb.connect(str(path)) as connection:
        assert connection.execute("SELECT mine FROM decisions").fetchall() == [(42,)]
        assert _rows(connection)["routing"] == rows["routing"]
        connection.execute(f"ALTER {kind} decisions RENAME TO my_decisions")
    with Store(path) as store:
        assert store.fetch("SELECT mine FROM my_decisions") == [(42,)]


def test_views_and_tables_of_the_user_survive(path: Path, old: object) -> None:
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE TABLE notes AS SELECT 'mine' AS note")
        connection.execute("CREATE VIEW names AS SELECT name FROM runs")
    with Store(path) as store:
        assert store.fetch("SELECT note FROM notes") == [("mine",)]
        assert len(store.fetch("FROM names")) == 2


def test_no_room_for_the_copy_changes_nothing(path: Path, old: object, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 500, 500))
    with pytest.raises(StoreError, match=rf"no room for the copy.*{len(before):,} bytes free.*Found: 500"):
        Store(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_step_that_fails_leaves_the_old_store(
    path: Path, old: dict[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {1: (*STEPS[1], "ALTER TABLE nowhere ADD COLUMN x INTEGER")}
    monkeypatch.setattr("moescope.store.migrations.steps.STEPS", broken)
    with pytest.raises(StoreError, match="could not be upgraded"):
        Store(path)
    assert _version(path) == "1"
    with duckdb.connect(str(path)) as connection:
        assert _rows(connection) == old
    monkeypatch.undo()
    with Store(path) as store:
        assert len(store.runs()) == 2


_KILLED = """
import os, sys
import moescope.store.migrations.upgrade as module
from moescope.store.store import Store
moment, path = sys.argv[1:]
steps, note, duckdb_close = module.run_steps, module.note, module._closed_at_end
def die(*_): print("at", moment, flush=True); os.kill(os.getpid(), 9)
if moment == "before the copy":
    module._keep_copy = die
elif moment == "while copying":
    module.shutil.copyfileobj = lambda source, target, _: (target.write(source.read(9000)), target.flush(), die())
elif moment == "before the steps":
    module.run_steps = die
elif moment == "after the steps":
    module.note = die
elif moment == "after the commit":
    module.logger.warning = die
    from contextlib import nullcontext
    module._closed_at_end = lambda connection: nullcontext()
Store(path)
"""


@pytest.mark.parametrize(
    "moment", ["before the copy", "while copying", "before the steps", "after the steps", "after the commit"]
)
def test_killed_upgrade_leaves_one_whole_version_and_the_next_opening_ends_it(
    path: Path, old: dict[str, list[dict[str, Any]]], moment: str
) -> None:
    process = subprocess.run(
        [sys.executable, "-c", _KILLED, moment, str(path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert process.stdout == f"at {moment}\n"
    assert _version(path) == (str(SCHEMA_VERSION) if moment == "after the commit" else "1")
    with Store(path) as store:
        new = _rows(store.connection)
        for table, rows in old.items():
            kept = [{key: row[key] for key in rows[0]} for row in new[table]]
            assert kept == rows or table == "store_info", table
        assert len(store.fetch("FROM decisions")) == sum(len(row["experts"]) for row in old["routing"])
    names = sorted(p.name for p in path.parent.iterdir())
    assert names == ["runs.duckdb", "runs.duckdb.v1"], "the copy of the first attempt is used again"


def test_what_a_killed_writer_left_in_the_log_is_upgraded_and_in_the_copy(path: Path, old: object) -> None:
    code = (
        "import sys, os, duckdb\n"
        "c = duckdb.connect(sys.argv[1])\n"
        "c.execute(\"UPDATE runs SET model = 'from the log'\")\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=False, timeout=60)
    assert path.with_name("runs.duckdb.wal").exists()
    with Store(path) as store:
        assert {run.model for run in store.runs()} == {"from the log"}
    with duckdb.connect(str(path.with_name("runs.duckdb.v1")), read_only=True) as connection:
        assert connection.execute("SELECT DISTINCT model FROM runs").fetchall() == [("from the log",)]


def test_file_is_locked_while_it_is_upgraded(path: Path, old: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying opens the file a second time; closing that must not let another process write meanwhile."""
    import moescope.store.migrations.upgrade as module

    found = []

    def steps(*arguments: Any) -> None:
        code = "import sys, duckdb; duckdb.connect(sys.argv[1])"
        other = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
        found.append(other.stderr)
        plain(*arguments)

    plain = module.run_steps
    monkeypatch.setattr(module, "run_steps", steps)
    Store(path).close()
    assert "Conflicting lock" in found[0]


def test_old_store_held_by_another_process_is_refused_and_left(
    path: Path, old: object, held: Callable[..., int]
) -> None:
    pid = held(path, "write")
    with pytest.raises(StoreError, match=rf"is in use.*{pid}"):
        Store(path)
    assert not path.with_name("runs.duckdb.v1").exists()


def test_old_store_open_in_this_process_is_refused_until_that_is_closed(path: Path, old: object) -> None:
    with duckdb.connect(str(path)), pytest.raises(StoreError, match="already open in this process"):
        Store(path)
    assert _version(path) == "1"
    Store(path).close()


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no links here")
def test_store_behind_a_link_is_upgraded_where_it_lies(path: Path, old: object, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "link.duckdb").symlink_to(path)
    with Store(folder / "link.duckdb") as store:
        assert len(store.runs()) == 2
    assert (folder / "link.duckdb").is_symlink()
    assert path.with_name("runs.duckdb.v1").exists()
    assert _version(path) == str(SCHEMA_VERSION)
