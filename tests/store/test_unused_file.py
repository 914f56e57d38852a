"""A file that was made only for something refused goes again, and nothing else ever does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moescope.core.errors import InputError
from moescope.store.store import Store


def _refused(path: Path, before: object = None) -> None:
    with pytest.raises(InputError), Store(path) as store:  # noqa: PT012  what is refused may come at any step
        if callable(before):
            before(store)
        store.run("nope")


def test_a_file_made_for_something_refused_goes_again(tmp_path: Path) -> None:
    _refused(tmp_path / "runs.duckdb")
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_was_there_stays(tmp_path: Path) -> None:
    Store(tmp_path / "runs.duckdb").close()
    _refused(tmp_path / "runs.duckdb")
    assert (tmp_path / "runs.duckdb").exists()


def test_another_store_of_the_same_name_in_another_folder_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    Store(tmp_path / "y" / "runs.duckdb").close()
    monkeypatch.chdir(tmp_path / "x")
    _refused(Path("runs.duckdb"), lambda _: os.chdir(tmp_path / "y"))
    assert (tmp_path / "y" / "runs.duckdb").exists()
    assert not (tmp_path / "x" / "runs.duckdb").exists()


def test_a_table_of_the_users_own_keeps_the_file(tmp_path: Path) -> None:
    _refused(tmp_path / "runs.duckdb", lambda store: store.connection.execute("CREATE TABLE mine AS SELECT 42 AS x"))
    with Store(tmp_path / "runs.duckdb") as store:
        assert store.sql("SELECT x FROM mine").fetchall() == [(42,)]


def test_a_file_that_is_open_a_second_time_stays(tmp_path: Path) -> None:
    second: list[Store] = []
    _refused(tmp_path / "runs.duckdb", lambda store: second.append(Store(store.path)))
    second[0].begin_run(name="kept", model="demo")
    second[0].close()
    with Store(tmp_path / "runs.duckdb", read_only=True) as store:
        assert [run.name for run in store.runs()] == ["kept"]


def test_a_link_that_leads_nowhere_yet_stays(tmp_path: Path) -> None:
    (tmp_path / "link.duckdb").symlink_to(tmp_path / "target.duckdb")
    _refused(tmp_path / "link.duckdb")
    assert (tmp_path / "link.duckdb").is_symlink()


def test_the_error_is_the_users_own_where_the_file_cannot_be_asked(tmp_path: Path) -> None:
    def aborted(store: Store) -> None:
        store.connection.execute("BEGIN")
        with pytest.raises(Exception, match="nothing"):
            store.connection.execute("SELECT * FROM nothing")
        raise InputError("mine")

    _refused(tmp_path / "runs.duckdb", aborted)
    assert (tmp_path / "runs.duckdb").exists()
