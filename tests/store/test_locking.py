from __future__ import annotations

import os
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from moescope.core.errors import InputError, StoreError
from moescope.store.locking import is_locked
from moescope.store.store import Store


@pytest.fixture
def locked(tmp_path: Path) -> object:
    with Store(tmp_path / "runs.duckdb", locked=True, memory="512MiB") as store:
        yield store


REACHING = [
    "SELECT * FROM read_csv('{file}')",
    "SELECT * FROM read_text('{file}')",
    "SELECT * FROM '{file}'",
    "SELECT * FROM glob('/*')",
    "COPY runs TO '{folder}/out.csv'",
    "EXPORT DATABASE '{folder}/out'",
    "ATTACH '{folder}/other.duckdb'",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET enable_external_access = true",
    "SET python_enable_replacements = true",
    "SET allowed_directories = ['/']",
    "SET allowed_configs = ['enable_external_access']",
    "SET lock_configuration = false",
    "SET memory_limit_of_nothing = 1",
    "SET temp_directory = '{folder}'",
    "CALL enable_logging(storage = 'file', storage_config = {{'path': '{folder}/log'}})",
]


@pytest.mark.parametrize("query", REACHING)
@pytest.mark.parametrize("mode", ["writing", "reading"])
def test_no_query_of_a_locked_store_reaches_outside(tmp_path: Path, query: str, mode: str) -> None:
    path, file = tmp_path / "runs.duckdb", tmp_path / "secret.csv"
    Store(path).close()
    file.write_text("secret\n1\n")
    before = set(tmp_path.iterdir())
    with Store(path, **({"locked": True} if mode == "writing" else {"read_only": True})) as store:
        assert is_locked(store.connection)
        with pytest.raises(duckdb.Error):
            store.cursor().execute(query.format(file=file, folder=tmp_path)).fetchall()
    assert set(tmp_path.iterdir()) - {tmp_path / "runs.duckdb.wal"} == before


def test_no_query_sees_a_variable_of_the_program(locked: Store) -> None:
    secret = pa.table({"password": ["hunter2"]})
    with pytest.raises(InputError, match="secret does not exist"):
        locked.fetch("SELECT * FROM secret")
    assert secret.num_rows == 1


def test_tables_that_are_handed_over_still_go_in(locked: Store) -> None:
    cursor = locked.cursor()
    run = locked.begin_run(name="base")
    cursor.register("rows", pa.table({"token_id": [7], "text": ["a"]}))
    cursor.execute("INSERT INTO vocabulary (run_id, token_id, text) SELECT ?, token_id, text FROM rows", [run.run_id])
    assert run.rows("vocabulary") == 1


def test_what_recording_changes_for_a_while_stays_open(locked: Store) -> None:
    locked.connection.execute("SET memory_limit = '200MiB'")
    locked.connection.execute("SET threads = 1")


def test_a_limit_of_memory_holds_and_large_queries_spill(locked: Store) -> None:
    assert locked.fetch("SELECT current_setting('memory_limit')") == [("512.0 MiB",)]
    query = "SELECT count(*) FROM (SELECT hash(range) AS h FROM range(8000000) ORDER BY h LIMIT 7999999)"
    assert locked.fetch(query) == [(7_999_999,)]


def test_compacting_keeps_the_locks(locked: Store) -> None:
    locked.compact()
    assert is_locked(locked.connection)


def test_folders_that_are_named_stay_open(tmp_path: Path) -> None:
    exports = tmp_path / "exports"
    exports.mkdir()
    with Store(tmp_path / "runs.duckdb", locked=True, folders=[exports]) as store:
        store.fetch(f"COPY runs TO '{exports}/runs.csv'")
        with pytest.raises(InputError, match="outside the store"):
            store.fetch(f"COPY runs TO '{tmp_path}/runs.csv'")
    assert (exports / "runs.csv").exists()


def test_an_older_store_is_not_upgraded_when_locked(tmp_path: Path) -> None:
    path = tmp_path / "old.duckdb"
    with Store(path) as store:
        store.connection.execute("UPDATE store_info SET value = '3' WHERE key = 'schema_version'")
    with pytest.raises(StoreError, match="moescope runs upgrade"):
        Store(path, locked=True)
    assert [p.name for p in tmp_path.iterdir()] == ["old.duckdb"]


def test_recording_into_a_locked_store_gives_what_it_gives_otherwise(tmp_path: Path) -> None:
    """Rows, vectors, effects and totals of the demo model, written through the locks."""
    import moescope as ms

    model, texts = ms.load("demo"), ["The cat sat on the mat. " * 4, "def f(x): return x + 1\n" * 3]
    counts = []
    for locked in (False, True):
        with Store(tmp_path / f"{locked}.duckdb", locked=locked) as store:
            probes = ("tokens", "routing", "experts", "residual", "attention", "activations")
            run = ms.record(model, texts, store, name="base", probes=probes, sites=("blocks.1.hook_resid_post",))
            cut = ms.Intervention([ms.edits.Ablate(layer=3, experts=[5], how="route_around")])
            ms.effect(model, texts, cut, store, controls=1)
            assert run.complete
            tables = (
                "tokens",
                "routing",
                "experts",
                "loads",
                "residual",
                "heads",
                "head_sequences",
                "activations",
                "effects",
            )
            counts.append([store.fetch(f"SELECT count(*) FROM {table}")[0][0] for table in tables])
    assert counts[0] == counts[1]
    assert 0 not in counts[0]


def test_the_folder_for_spilled_queries_cannot_be_guessed_and_is_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "runs.duckdb"
    Store(path).close()
    monkeypatch.setattr("moescope.store.locking.may_write", lambda folder: False)
    with Store(path, read_only=True, memory="512MiB") as store:
        spill = Path(store.fetch("SELECT current_setting('temp_directory')")[0][0])
        assert spill.is_dir()
        assert spill.stat().st_mode & 0o777 == 0o700
        assert str(os.getpid()) not in spill.name
        query = "SELECT count(*) FROM (SELECT hash(range) AS h FROM range(8000000) ORDER BY h LIMIT 7999999)"
        assert store.fetch(query) == [(7_999_999,)]
    assert not spill.exists()
