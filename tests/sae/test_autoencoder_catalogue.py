"""The table `saes` and its folders: both or neither, found by name, renamed, exported, deleted."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moescope.core.errors import InputError, RunError, StoreError
from moescope.sae.catalogue import (
    CONFIG,
    WEIGHTS,
    add_sae,
    delete_saes,
    export_sae,
    free_sae_name,
    rename_sae,
    sae_row,
    sae_rows,
    saes_folder,
)
from moescope.store.store import Store


def _written(folder: Path) -> Mapping[str, Any] | None:
    (folder / CONFIG).write_text("{}")
    (folder / WEIGHTS).write_bytes(b"weights of nothing")
    return {"d_in": 7}


def _add(store: Any, name: str) -> dict[str, Any]:
    return add_sae(store, {"name": name, "site": "blocks.0.hook_resid_pre", "settings": {"seed": 1}}, _written)


def test_row_and_files_belong_together(store: Any) -> None:
    row = _add(store, "one")
    folder = store.path.parent / row["path"]
    assert folder == saes_folder(store.path) / row["sae_id"]
    assert sorted(file.name for file in folder.iterdir()) == [CONFIG, WEIGHTS]
    assert row["checksum"] == hashlib.sha256(b"weights of nothing").hexdigest()
    assert (row["d_in"], row["settings"]) == (
        7,
        {"seed": 1, "configuration_checksum": row["settings"]["configuration_checksum"]},
    )
    assert "sae_lens" in row["versions"]
    assert sae_row(store, "one") == sae_row(store, row["sae_id"]) == row


def test_neither_row_nor_files_where_writing_fails(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path) -> None:
        (folder / CONFIG).write_text("{}")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="No space left"):
        add_sae(store, {"name": "one"}, full)

    def refused(*_: Any, **__: Any) -> None:
        raise RunError("rows could not be stored")

    monkeypatch.setattr("moescope.sae.catalogue.write_rows", refused)
    with pytest.raises(RunError, match="rows could not"):
        _add(store, "one")
    assert sae_rows(store) == []
    assert list(saes_folder(store.path).iterdir()) == []


def test_names_are_taken_once(store: Any) -> None:
    _add(store, "one")
    with pytest.raises(InputError, match="has an autoencoder of that name"):
        _add(store, "one")
    assert [free_sae_name(store, name) for name in ("one", "two")] == ["one-2", "two"]
    assert free_sae_name(store, "one", ["one-2"]) == "one-3"
    assert len(list(saes_folder(store.path).iterdir())) == 1


def test_unknown_name_tells_those_there_are(store: Any) -> None:
    with pytest.raises(InputError, match="train one"):
        sae_row(store, "one")
    _add(store, "one")
    with pytest.raises(InputError, match=r"no autoencoder 'two'.*one of one"):
        sae_row(store, "two")


def test_renaming(store: Any) -> None:
    row = _add(store, "one")
    _add(store, "two")
    rename_sae(store, "one", "three")
    assert sae_row(store, "three")["sae_id"] == row["sae_id"]
    with pytest.raises(InputError, match="has an autoencoder"):
        rename_sae(store, "three", "two")


def test_deleting_takes_every_row_and_the_folder(store: Any) -> None:
    gone, stays = _add(store, "gone"), _add(store, "stays")
    for row in (gone, stays):
        for table in ("features", "sae_measures", "feature_labels"):
            store.connection.execute(
                f"INSERT INTO {table} (sae_id, run_id) VALUES (?, ?)", [row["sae_id"], str(uuid.uuid4())]
            )
    deleted = delete_saes(store, ["gone"])
    assert deleted.rows == {"saes": 1, "features": 1, "sae_measures": 1, "feature_labels": 1}
    assert deleted.folder_bytes == len("{}") + len(b"weights of nothing")
    assert [row["name"] for row in sae_rows(store)] == ["stays"]
    assert [p.name for p in saes_folder(store.path).iterdir()] == [stays["sae_id"]]
    assert store.fetch("SELECT count(*) FROM features") == [(1,)]
    delete_saes(store, ["stays"])
    assert not saes_folder(store.path).exists()


def test_a_path_in_the_table_cannot_make_it_delete_elsewhere(store: Any, tmp_path: Path) -> None:
    row = _add(store, "one")
    precious = tmp_path / "precious"
    precious.mkdir()
    store.connection.execute("UPDATE saes SET path = 'precious' WHERE sae_id = ?", [row["sae_id"]])
    delete_saes(store, ["one"])
    assert precious.is_dir()


def test_export_gives_the_files_and_overwrites_nothing(store: Any, tmp_path: Path) -> None:
    row = _add(store, "one")
    written = export_sae(store, "one", tmp_path / "out")
    assert [path.read_bytes() for path in written] == [b"{}", b"weights of nothing"]
    with pytest.raises(InputError, match="not there yet"):
        export_sae(store, "one", tmp_path / "out")
    (store.path.parent / row["path"] / WEIGHTS).write_bytes(b"others")
    with pytest.raises(StoreError, match="not the file"):
        export_sae(store, "one", tmp_path / "again")


def test_stores_for_reading_are_not_written(tmp_path: Path) -> None:
    with Store(tmp_path / "runs.duckdb") as store:
        _add(store, "one")
    with Store(tmp_path / "runs.duckdb", read_only=True) as store:
        for change in (
            lambda: _add(store, "two"),
            lambda: rename_sae(store, "one", "x"),
            lambda: delete_saes(store, ["one"]),
        ):
            with pytest.raises(InputError, match="reading only"):
                change()
        assert [row["name"] for row in sae_rows(store)] == ["one"]


def test_deleting_the_run_leaves_what_was_trained_on_it(store: Any) -> None:
    from moescope.store.deleting import delete_runs

    run_id = str(uuid.uuid4())
    store.connection.execute("INSERT INTO runs (run_id, name, status) VALUES (?, 'base', 'complete')", [run_id])
    add_sae(store, {"name": "one", "trained_on": run_id}, _written)
    delete_runs(store, [store.run("base")])
    assert [row["name"] for row in sae_rows(store)] == ["one"]
