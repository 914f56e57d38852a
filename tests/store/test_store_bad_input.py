"""What a store meets in the world: wrong files, damage, other programs, strange names, clocks that jump."""

from __future__ import annotations

import datetime
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moescope.core.errors import InputError, MoescopeError, StoreError
from moescope.store.ending import end_run
from moescope.store.run import Run
from moescope.store.schema import TABLES
from moescope.store.store import Store

NOBODY = 65534


def _routed(store: Store, name: str = "base", rows: int = 60_000) -> Run:
    run = store.begin_run(name=name, model="demo")
    store.connection.execute(
        """
        INSERT INTO routing
        SELECT ?, i // 4, i % 4, 'mlp', [(hash(i) % 8)::USMALLINT], [random()::FLOAT], random(), random()
        FROM range(?) AS t(i)
        """,
        [run.run_id, rows],
    )
    counted = (
        "SELECT run_id, layer, block, NULL, 'prefill', expert, count(*), sum(weight) FROM decisions WHERE run_id = ?"
    )
    grouped = "GROUP BY run_id, layer, block, expert"
    store.connection.execute(f"INSERT INTO loads {counted} {grouped}", [run.run_id])
    store.connection.execute("UPDATE runs SET status = 'complete'")
    return run


# Files of other kinds ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read_only", [False, True])
def test_real_parquet_and_sqlite_files_are_named_and_left(tmp_path: Path, read_only: bool) -> None:
    parquet, sqlite = tmp_path / "a.duckdb", tmp_path / "b.duckdb"
    pq.write_table(pa.table({"a": [1, 2]}), parquet)
    with sqlite3.connect(sqlite) as connection:
        connection.execute("CREATE TABLE t (a INTEGER)")
    connection.close()
    for path, kind in ((parquet, "a Parquet file"), (sqlite, "an SQLite database")):
        before = path.read_bytes()
        with pytest.raises(StoreError, match=rf"is not a store.*Found: {kind}"):
            Store(path, read_only=read_only)
        assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.duckdb", "b.duckdb"]


@pytest.mark.parametrize("read_only", [False, True])
def test_file_of_no_bytes_is_refused_with_what_to_do(path: Path, read_only: bool) -> None:
    path.touch()
    with pytest.raises(StoreError, match=r"is not a store.*0 bytes.*delete it"):
        Store(path, read_only=read_only)
    assert path.read_bytes() == b""


@pytest.mark.parametrize("read_only", [False, True])
def test_links_that_lead_nowhere_are_told_apart(tmp_path: Path, read_only: bool) -> None:
    loop, other, broken = tmp_path / "loop", tmp_path / "other", tmp_path / "broken"
    loop.symlink_to(other)
    other.symlink_to(loop)
    with pytest.raises(StoreError, match=r"cannot read .*loop.*check the path and its links"):
        Store(loop, read_only=read_only)
    with pytest.raises(StoreError):
        Store(loop / "runs.duckdb", read_only=read_only)
    broken.symlink_to(tmp_path / "no" / "where.duckdb")
    with pytest.raises(StoreError, match=r"no store at|no such folder"):
        Store(broken, read_only=read_only)
    assert broken.is_symlink()


def test_store_is_made_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.duckdb").symlink_to(tmp_path / "disk" / "runs.duckdb")
    with Store(tmp_path / "link.duckdb") as store:
        store.begin_run(name="base")
    assert (tmp_path / "link.duckdb").is_symlink()
    assert (tmp_path / "disk" / "runs.duckdb").is_file()


def test_pipes_and_devices_are_refused_without_waiting_on_them(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(StoreError, match="a device or a pipe"):
            Store(path, read_only=True)


# Damage --------------------------------------------------------------------------------------------------------------


def _hashes(path: Path) -> list[Any]:
    with Store(path, read_only=True) as store:
        query = 'SELECT count(*), bit_xor(hash(t)) FROM "{}" AS t'
        return [store.fetch(query.format(table.name)) for table in TABLES]


def _hashes_or_refusal(path: Path) -> Any:
    try:
        return _hashes(path)
    except MoescopeError as refused:
        return refused


def test_flipped_bits_are_noticed_or_lie_in_unused_room(path: Path) -> None:
    """Wherever a byte is wrong: the store is refused, or a query is, or it reads as it was written. Never otherwise."""
    with Store(path) as store:
        _routed(store)
    whole, expected = path.read_bytes(), _hashes(path)
    noticed = 0
    drawn = random.Random(0)
    for _ in range(40):
        content = bytearray(whole)
        content[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)
        path.write_bytes(content)
        found = _hashes_or_refusal(path)
        assert path.read_bytes() == content
        if isinstance(found, MoescopeError):
            assert isinstance(found, StoreError), found
            assert "damaged" in str(found)
            assert "restore it from a copy" in str(found)
            noticed += 1
        else:
            assert found == expected
    assert noticed >= 20


def test_damage_met_while_opening_for_writing_changes_nothing(path: Path) -> None:
    with Store(path) as store:
        _routed(store)
    content = bytearray(path.read_bytes())
    content[12_300] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(StoreError, match="damaged"):
        Store(path)
    assert path.read_bytes() == content


def test_query_about_the_word_corrupt_is_not_taken_for_damage(store: Store) -> None:
    for query in ("SELECT * FROM corrupt", "SELECT error('Corrupt database file')"):
        with pytest.raises(InputError, match="the query failed"):
            store.fetch(query)


# Other programs ------------------------------------------------------------------------------------------------------


def test_holder_is_told_by_program_and_process(path: Path, held: Callable[..., int]) -> None:
    Store(path).close()
    pid = held(path, "write")
    with pytest.raises(StoreError, match=rf"is in use.*held by \S*python\S* \(process {pid}\).*close that program"):
        Store(path)


_READS = """
import sys
from moescope.store.store import Store
with Store(sys.argv[1], read_only=True) as store:
    print(store.fetch("SELECT count(*), count(DISTINCT expert) FROM decisions")[0], flush=True)
    sys.stdin.read()
"""


def test_several_processes_read_a_finished_store_at_once(path: Path) -> None:
    with Store(path) as store:
        _routed(store)
    command = [sys.executable, "-c", _READS, str(path)]
    readers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    try:
        said = [reader.stdout.readline() for reader in readers if reader.stdout]
        assert said == ["(60000, 8)\n"] * 4, "all of them read while all of them hold it"
        with pytest.raises(StoreError, match="is in use"):
            Store(path)
        with Store(path, read_only=True) as store:
            assert len(store.runs()) == 1
    finally:
        for reader in readers:
            reader.communicate("", timeout=30)
    Store(path).close()


_WRITES = "import sys, duckdb; duckdb.connect(sys.argv[1]).execute('CREATE TABLE mine AS SELECT 1')"


def _write_elsewhere(path: Path) -> str:
    done = subprocess.run([sys.executable, "-c", _WRITES, str(path)], capture_output=True, text=True, check=False)
    return done.stderr


def test_opening_a_store_twice_in_a_process_does_not_let_others_in(path: Path) -> None:
    """On POSIX systems, closing any handle of a file gives up the locks that the process has on it."""
    with Store(path) as store:
        for again in (path, path.parent / "." / path.name):
            with Store(again) as second:
                second.runs()
            with pytest.raises(StoreError):
                Store(again, read_only=True)
        assert f'Could not set lock on file "{path}": Conflicting lock' in _write_elsewhere(path)
        assert store.runs() == []
    assert _write_elsewhere(path) == ""


def test_two_threads_open_the_same_store(path: Path) -> None:
    Store(path).close()
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(5):
                with Store(path) as store:
                    store.begin_run(name=f"{number} {turn}")
        except BaseException as failure:  # noqa: BLE001
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with Store(path) as store:
        assert len(store.runs()) == 10


@pytest.mark.parametrize("times", [3, 10**9])
def test_store_that_another_thread_is_just_closing_is_waited_for(
    path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Between the two, DuckDB knows the file neither as open nor as closed; it is not waited for without end."""
    Store(path).close()
    plain, left = duckdb.connect, [times]

    def connect(*arguments: Any, **options: Any) -> duckdb.DuckDBPyConnection:
        left[0] -= 1
        if left[0] >= 0:
            raise duckdb.BinderException(f'"{path}" is already attached by database "runs"')
        return plain(*arguments, **options)

    monkeypatch.setattr("moescope.store.opening.duckdb.connect", connect)
    monkeypatch.setattr("moescope.store.opening._PATIENCE_SECONDS", 0.3)
    if times == 3:
        Store(path).close()
        return
    with pytest.raises(StoreError, match="already attached"):
        Store(path)


# Permissions ---------------------------------------------------------------------------------------------------------


@contextmanager
def _as_nobody() -> Iterator[None]:
    """Root may do everything: be somebody else."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def locked_folder() -> Iterator[Path]:
    """A folder that may be read and not written, with a store in it; outside tmp_path, which only root may enter."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Store(folder / "runs.duckdb") as store:
            _routed(store)
        (folder / "runs.duckdb").chmod(0o666)
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)


def test_store_on_a_read_only_folder_is_read_and_not_written(locked_folder: Path) -> None:
    path = locked_folder / "runs.duckdb"
    before = path.read_bytes()
    with Store(path, read_only=True) as store:  # everything is imported before the rights to read it are gone
        store.fetch("SELECT count(*) FROM decisions")
    with _as_nobody():
        with Store(path, read_only=True) as store:
            assert store.fetch("SELECT count(*) FROM decisions") == [(60_000,)]
            spill = store.fetch("SELECT current_setting('temp_directory')")[0][0]
            assert not spill.startswith(str(locked_folder)), "large queries need a place that may be written"
        with pytest.raises(StoreError, match=r"cannot write .*no permission for its folder.*read_only=True"):
            Store(path)
        with pytest.raises(StoreError, match="cannot write"):
            Store(locked_folder / "new.duckdb")
    assert path.read_bytes() == before


def test_store_that_may_not_be_read_says_so(locked_folder: Path) -> None:
    (locked_folder / "runs.duckdb").chmod(0o000)
    with _as_nobody(), pytest.raises(StoreError, match=r"cannot read .*Permission denied"):
        Store(locked_folder / "runs.duckdb", read_only=True)


# A store opened for reading is closed in on itself --------------------------------------------------------------------

_REACHING_OUT = (
    "SELECT * FROM read_text('{0}/secret.txt')",
    "SELECT * FROM '{0}/secret.csv'",
    "COPY (SELECT 1) TO '{0}/out.csv'",
    "ATTACH '{0}/other.duckdb'",
    "INSTALL httpfs",
)


@pytest.fixture
def reader(path: Path) -> Iterator[Store]:
    (path.parent / "secret.txt").write_text("secret")
    (path.parent / "secret.csv").write_text("a\n1\n")
    with Store(path) as store:
        _routed(store)
    with Store(path, read_only=True) as store:
        yield store


@pytest.mark.parametrize("query", _REACHING_OUT)
def test_queries_reach_nothing_outside(reader: Store, query: str) -> None:
    with pytest.raises(InputError):
        reader.fetch(query.format(reader.path.parent))
    assert not (reader.path.parent / "out.csv").exists()


def test_file_outside_is_refused_with_the_way_to_allow_it(reader: Store) -> None:
    with pytest.raises(InputError, match=r"(?s)a file outside the store.*folders=\["):
        reader.fetch(_REACHING_OUT[0].format(reader.path.parent))


@pytest.mark.parametrize(
    "setting",
    ["enable_external_access = true", "lock_configuration = false", "threads = 1", "allowed_directories = ['/']"],
)
def test_settings_cannot_be_changed(reader: Store, setting: str) -> None:
    with pytest.raises(InputError, match="locked"):
        reader.fetch(f"SET {setting}")


def test_view_of_a_stranger_cannot_read_files(path: Path) -> None:
    (path.parent / "secret.txt").write_text("secret")
    with Store(path) as store:
        store.connection.execute(f"CREATE VIEW bait AS SELECT * FROM read_text('{path.parent}/secret.txt')")
        assert store.fetch("SELECT content FROM bait") == [("secret",)]
    with Store(path, read_only=True) as store, pytest.raises(InputError, match="outside the store"):
        store.fetch("SELECT content FROM bait")


def test_view_of_a_stranger_that_poses_as_our_table_reads_nothing(path: Path) -> None:
    (path.parent / "secret.txt").write_text("secret")
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE SCHEMA other")
        connection.execute("CREATE TABLE other.store_info (key VARCHAR, value VARCHAR)")
        said = f"SELECT 'application' AS key, content AS value FROM read_text('{path.parent}/secret.txt')"
        connection.execute(f"CREATE VIEW store_info AS {said}")
    with pytest.raises(StoreError, match=r"file system operations are disabled"):
        Store(path, read_only=True)


def test_everything_else_works_in_a_store_opened_for_reading(reader: Store) -> None:
    import moescope as ms

    run = reader.run("base")
    rows = run.sql("SELECT expert, count(*) AS n FROM decisions WHERE run_id = $run GROUP BY expert ORDER BY expert")
    assert rows.to_arrow_table()["n"].to_pylist() == [n for _, n in rows.fetchall()] == rows.df()["n"].tolist()
    assert rows.pl()["n"].to_list() == rows.df()["n"].tolist()
    cursor = reader.cursor()
    cursor.register("chosen", pa.table({"expert": [1, 2]}))
    assert cursor.execute("SELECT count(*) FROM decisions JOIN chosen USING (expert)").fetchall()[0][0] > 0
    assert ms.analyze(run, "load").table.num_rows == 4 * 8
    with duckdb.connect(str(reader.path), read_only=True) as plain:
        assert plain.execute("SELECT count(*) FROM runs").fetchall() == [(1,)], "a plain client beside it"


def test_folder_that_is_named_can_be_read_and_written(path: Path, tmp_path: Path) -> None:
    with Store(path) as store:
        _routed(store, rows=10)
    folder = tmp_path / "it's an export"
    folder.mkdir()
    with Store(path, read_only=True, folders=[folder]) as store:
        target = str(folder / "x.parquet").replace("'", "''")
        store.fetch(f"COPY (SELECT * FROM decisions) TO '{target}'")
        assert store.fetch(f"SELECT count(*) FROM '{target}'") == [(10,)]
        with pytest.raises(InputError, match="outside the store"):
            store.fetch(f"COPY (SELECT 1) TO '{tmp_path}/y.csv'")
        with pytest.raises(StoreError, match="for other folders"):
            Store(path, read_only=True, folders=[tmp_path])
        with Store(path, read_only=True, folders=[folder]) as second:
            assert len(second.runs()) == 1


def test_store_opened_for_writing_is_open_to_files(path: Path) -> None:
    with Store(path) as store:
        store.fetch(f"COPY (SELECT 1 AS a) TO '{path.parent}/x.parquet'")
        assert store.fetch(f"SELECT a FROM '{path.parent}/x.parquet'") == [(1,)]


# Names, labels, texts, clocks ----------------------------------------------------------------------------------------

NAMES = ("quo'te", 'dou"ble', "🧪" * 3, "line one\nline two", "a" * 300, "; DROP TABLE runs --", "\\", "%s $run ?")


@pytest.mark.parametrize("name", NAMES)
def test_run_of_any_name_goes_through_everything(path: Path, name: str) -> None:
    with Store(path) as store:
        store.begin_run(name="other")
        _routed(store, name, rows=4)
        assert store.run(name).rows("decisions") == 4
        assert store.fetch("SELECT name FROM run_overview WHERE name = ?", [name]) == [(name,)]
        assert name in repr(store)
        store.compact()
        assert store.run(name).rows("decisions") == 4
        store.delete_run(name)
        assert [run.name for run in store.runs()] == ["other"]


def test_label_of_no_characters_is_a_label_and_none_is_none(store: Store, run: Run) -> None:
    insert = "INSERT INTO sequences (run_id, sequence_id, document_id, label, n_tokens) VALUES (?, ?, ?, ?, 3)"
    for number, label in enumerate(["", "", None, "a"]):
        store.connection.execute(insert, [run.run_id, number, number, label])
        load = "INSERT INTO loads VALUES (?, 0, 'mlp', ?, 'prefill', 0, 2, 1.0)"
        store.connection.execute(load, [run.run_id, label])
    labels = dict(store.fetch("SELECT label, documents FROM labels"))
    assert labels == {"": 2, None: 1, "a": 1}
    loads = dict(store.fetch("SELECT label, tokens FROM expert_load_by_label"))
    assert loads == {"": 4, None: 2, "a": 2}


def test_text_of_ten_megabytes_comes_back_whole(path: Path) -> None:
    text = "".join(chr(0x100 + (i * 7919) % 0x2000) for i in range(5_000_000)) + "\x00 '\n🧪"
    assert len(text.encode()) > 10_000_000
    with Store(path) as store:
        run = store.begin_run(name="long")
        insert = "INSERT INTO sequences (run_id, sequence_id, document_id, text, n_tokens) VALUES (?, 0, 0, ?, 9)"
        store.connection.execute(insert, [run.run_id, text])
        store.connection.execute("UPDATE runs SET status = 'complete'")
        store.compact()
        other = store.begin_run(name="short")
        store.connection.execute("UPDATE runs SET status = 'complete'")
        store.connection.execute("CHECKPOINT")
        assert store.sizes()[run.run_id].table_bytes > 1_000_000 > store.sizes()[other.run_id].table_bytes
    with Store(path, read_only=True) as store:
        assert store.run("long").table("sequences").fetchall()[0][5] == text
    with Store(path) as store:
        store.delete_run("long")
        assert store.compact().after < 2_000_000


def test_clock_that_is_set_back_changes_no_number(store: Store) -> None:
    late = datetime.datetime(2199, 1, 1)
    run = store.begin_run(name="from the future", started_at=late)
    store.begin_run(name="now")
    end_run(store, run, [], {"tokens": 10, "seconds": 2.0, "tokens_per_second": 5.0}, failed=False)
    info = run.info
    assert info["status"] == "complete"
    assert info["finished_at"] < info["started_at"] == late
    overview = "SELECT seconds, tokens_per_second, finished_at < started_at FROM run_overview WHERE name = ?"
    assert store.fetch(overview, ["from the future"]) == [(2.0, 5.0, True)]
    assert [r.name for r in store.runs()] == ["now", "from the future"]
    assert "2199-01-01" in str(run.provenance["started_at"])


def test_run_that_cannot_be_entered_is_told_in_words(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        """A connection to a disk without room."""

        def execute(self, *_: object) -> None:
            raise duckdb.IOException("IO Error: No space left on device")

    kept = store._connection
    monkeypatch.setattr(store, "_connection", Full())
    monkeypatch.setattr(store, "cursor", lambda: kept.cursor() if kept else None)
    with pytest.raises(StoreError, match=r"cannot be written.*No space left.*free some space"):
        store.begin_run(name="base")
