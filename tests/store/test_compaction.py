"""Compacting: the same content in a smaller file, put in place at once, refused while anything else uses the store."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import duckdb
import pytest

from moescope.core.errors import InputError, StoreError
from moescope.store.store import Store

_SPEC = importlib.util.spec_from_file_location("moescope_tests_every_table", Path(__file__).parent / "every_table.py")
assert _SPEC is not None
assert _SPEC.loader is not None
every_table: Any = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(every_table)


@pytest.fixture
def full(path: Path) -> Path:
    """A store of two small runs, something of the user's own, and the room of a large run that was deleted."""
    with Store(path) as store:
        store.connection.execute("CREATE TABLE dropped AS SELECT random() AS x FROM range(1200000)")
        store.connection.execute("CHECKPOINT")
        for number, name in ((1, "first"), (2, "sec'ond 🧪")):
            every_table.fill(store.connection, str(uuid.UUID(int=number)), name, rows=40)
        store.connection.execute('CREATE SCHEMA "my \'notes"')
        store.connection.execute('CREATE TABLE "my \'notes"."a ""b""" AS SELECT \'mine\' AS note')
        store.connection.execute("CREATE VIEW names AS SELECT name FROM runs")
        store.connection.execute("CHECKPOINT")
        store.connection.execute("DROP TABLE dropped")
    return path


def _whole(path: Path) -> tuple[Any, Any, Any]:
    with duckdb.connect(str(path), read_only=True) as connection:
        notes = connection.execute('SELECT note FROM "my \'notes"."a ""b"""').fetchall()
        return every_table.contents(connection), every_table.shape(connection), notes


def test_content_shape_and_order_are_the_same_and_the_file_is_smaller(full: Path) -> None:
    full.chmod(0o640)
    before, size = _whole(full), full.stat().st_size
    with Store(full) as store:
        done = store.compact()
        assert len(store.runs()) == 2, "the store goes on working"
        assert store.fetch("SELECT count(*) FROM decisions") == [(2 * 40 * 3,)]
        store.begin_run(name="next")
        store.connection.execute("DELETE FROM runs WHERE name = 'next'")
    assert done.before == size
    assert done.after < 0.75 * done.before  # every table with a row takes blocks of its own, before and after
    assert _whole(full) == before
    assert full.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in full.parent.iterdir()] == [full.name]


def test_compacting_twice_changes_nothing_more(full: Path) -> None:
    with Store(full) as store:
        first, second = store.compact(), store.compact()
    assert second.before == first.after
    assert abs(second.after - second.before) <= 1 << 20


def test_deleting_and_compacting_give_the_room_back(path: Path) -> None:
    with Store(path) as store:
        empty = store.compact().after
        run = store.begin_run(name="large")
        store.connection.execute(
            "INSERT INTO residual SELECT ?, i, 0, random(), [random(), 0, 0], [1, 2, 3] FROM range(300000) t(i)",
            [run.run_id],
        )
        store.connection.execute("UPDATE runs SET status = 'complete'")
        store.connection.execute("CHECKPOINT")
        large = path.stat().st_size
        store.delete_run(run)
        assert store.compact().after <= empty + (1 << 20) < large


def test_no_room_is_told_before_anything_is_written(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = full.read_bytes()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6 - 4096, 4096))
    with Store(full) as store:
        with pytest.raises(StoreError, match=r"no room to compact .*bytes free in .*Found: 4,096"):
            store.compact()
        assert len(store.runs()) == 2, "the store is open again"
    assert full.read_bytes() == before
    assert [p.name for p in full.parent.iterdir()] == [full.name]


@pytest.mark.parametrize("failure", [duckdb.IOException("No space left on device"), OSError(28, "No space left")])
def test_failure_half_way_leaves_the_store_and_no_second_file(
    full: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    before = _whole(full)

    def fail(_connection: object, _path: Path, target: Path) -> None:
        target.write_bytes(b"half")
        target.with_name(target.name + ".wal").write_bytes(b"log")
        raise failure

    monkeypatch.setattr("moescope.store.compaction._copy", fail)
    with Store(full) as store, pytest.raises(StoreError, match=r"could not be compacted.*No space left.*as it was"):
        store.compact()
    assert _whole(full) == before
    assert [p.name for p in full.parent.iterdir()] == [full.name]


def test_file_that_lacks_rows_is_never_put_in_place(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _whole(full)

    class Losing:
        """A connection under which a row is lost on the way."""

        def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
            self.connection = connection

        def execute(self, query: str) -> Any:
            done = self.connection.execute(query)
            if query.startswith("COPY FROM DATABASE"):
                self.connection.execute("DELETE FROM compacted.main.runs WHERE name = 'first'")
            return done

    import moescope.store.compaction as module

    plain = module._copy
    monkeypatch.setattr(module, "_copy", lambda connection, *paths: plain(Losing(connection), *paths))  # type: ignore[arg-type]
    with Store(full) as store, pytest.raises(StoreError, match=r"Expected: 2 rows of runs.*Found: 1"):
        store.compact()
    assert _whole(full) == before


def test_run_being_recorded_is_refused(path: Path) -> None:
    with Store(path) as store:
        run = store.begin_run(name="base")
        with pytest.raises(InputError, match="'base' is being recorded"):
            store.compact()
        assert run.status == "running"


def test_other_users_in_this_process_are_refused_until_they_are_closed(full: Path) -> None:
    with Store(full) as store:
        with Store(full), pytest.raises(StoreError, match=r"in use.*of this process"):
            store.compact()
        assert len(store.runs()) == 2, "the store is open again"
        store.compact()


def test_cursors_and_results_taken_before_are_closed_not_left_on_the_old_file(full: Path) -> None:
    with Store(full) as store:
        cursor, relation = store.cursor(), store.sql("SELECT name FROM runs")
        store.compact()
        for ask in (lambda: cursor.execute("UPDATE runs SET seed = 1"), relation.fetchall):
            with pytest.raises(duckdb.ConnectionException, match="closed"):
                ask()


@pytest.mark.parametrize("moment", ["copied", "put in place"])
def test_other_processes_cannot_write_while_the_file_is_replaced(
    full: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """What they wrote between would be lost."""
    import moescope.store.compaction as module

    found = []

    def write() -> None:
        code = "import sys, duckdb; duckdb.connect(sys.argv[1]).execute('UPDATE runs SET seed = 1')"
        found.append(
            subprocess.run([sys.executable, "-c", code, str(full)], capture_output=True, text=True, check=False)
        )

    plain_copy, plain_mode = module._copy, shutil.copymode
    if moment == "copied":
        monkeypatch.setattr(module, "_copy", lambda *a: (plain_copy(*a), write()))
    else:
        monkeypatch.setattr(module.shutil, "copymode", lambda *a: (plain_mode(*a), write()))
    with Store(full) as store:
        store.compact()
    assert "Conflicting lock" in found[0].stderr


def test_two_compactions_at_once_are_refused(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import moescope.store.compaction as module

    found = []

    def copy(*arguments: Any) -> None:
        code = "import sys; from pathlib import Path; from moescope.store.compaction import compact_file as c; c(Path(sys.argv[1]))"
        found.append(
            subprocess.run([sys.executable, "-c", code, str(full)], capture_output=True, text=True, check=False)
        )
        plain(*arguments)

    plain = module._copy
    monkeypatch.setattr(module, "_copy", copy)
    with Store(full) as store:
        store.compact()
    assert "is being compacted" in found[0].stderr


_KILLED = """
import os, sys
import moescope.store.compaction as module
from moescope.store.store import Store
plain = module._copy
def copy(*arguments):
    plain(*arguments)
    os.kill(os.getpid(), 9)
module._copy = copy
Store(sys.argv[1]).compact()
"""


def test_killed_compaction_leaves_the_store_and_the_next_one_clears_away(full: Path) -> None:
    before = _whole(full)
    done = subprocess.run([sys.executable, "-c", _KILLED, str(full)], check=False, timeout=60)
    assert done.returncode == -9
    assert _whole(full) == before
    assert len(list(full.parent.iterdir())) > 1
    with Store(full) as store:
        store.compact()
    assert _whole(full) == before
    assert [p.name for p in full.parent.iterdir()] == [full.name]


def test_store_open_for_reading_is_refused(full: Path) -> None:
    with Store(full, read_only=True) as store, pytest.raises(InputError, match="open for reading only"):
        store.compact()


def test_store_behind_a_link_is_compacted_where_it_lies(full: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    link = folder / "link.duckdb"
    link.symlink_to(full)
    with Store(link) as store:
        store.compact()
    assert link.is_symlink()
    assert not full.is_symlink()
    assert len(_whole(full)[0]["runs"]) == 2


def test_damaged_store_is_not_replaced(full: Path) -> None:
    with Store(full) as store:
        run = store.begin_run(name="x")
        store.connection.execute(
            "INSERT INTO residual SELECT ?, i, 0, random(), [random(), 0, 0], [1, 2, 3] FROM range(300000) t(i)",
            [run.run_id],
        )
        store.connection.execute("UPDATE runs SET status = 'complete'")
    with duckdb.connect(str(full), read_only=True) as connection:
        query = "SELECT max(block_id) FROM pragma_storage_info('residual') WHERE column_name = 'norm'"
        block = connection.execute(query).fetchall()[0][0]
    content = bytearray(full.read_bytes())
    content[3 * 4096 + block * 262_144 + 999] ^= 0xFF
    full.write_bytes(content)
    with Store(full) as store, pytest.raises(StoreError, match=r"could not be compacted.*Corrupt"):
        store.compact()
    assert full.read_bytes() == bytes(content)
    assert [p.name for p in full.parent.iterdir()] == [full.name]
