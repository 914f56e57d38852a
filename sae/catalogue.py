"""The table `saes` and the folders beside the store: autoencoders written whole, found by name, renamed, deleted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import duckdb

from moescope.core.errors import InputError, RunError, StoreError
from moescope.core.json_data import to_json
from moescope.core.text import whole_characters
from moescope.core.versions import library_versions
from moescope.store.sae_rows import write_rows
from moescope.store.schema import TABLES
from moescope.store.store import Store
from moescope.store.transaction import transaction

# Rows that name an autoencoder by other columns than `sae_id`, which go with it too.
_NAMED_ELSEWHERE = {
    "description_scores": "description_id IN (SELECT description_id FROM descriptions WHERE sae_id = ?)",
    "feature_links": "other_sae_id = ?",
}
WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
_JSON_COLUMNS = ("settings", "summary", "source", "versions")
_PIECE = 1 << 20


@dataclass(frozen=True)
class DeletedSaes:
    """What deleting autoencoders took away.

    Attributes:
        rows: table → rows; tables without any are left out.
        folder_bytes: bytes of the files beside the store.
    """

    rows: Mapping[str, int]
    folder_bytes: int


def saes_folder(store: Path) -> Path:
    """Where the weights of a store's autoencoders lie: beside it, named after it.

    Example:
        >>> saes_folder(Path("data/runs.duckdb")).as_posix()
        'data/runs.saes'
    """
    return store.with_suffix(".saes")


def sae_rows(store: Store) -> list[dict[str, Any]]:
    """Every row of `saes`, the newest last, JSON columns read.

    Args:
        store: to look in.
    """
    found = store.sql("SELECT * FROM saes ORDER BY created_at, name").to_arrow_table().to_pylist()
    return [_read(row) for row in found]


def sae_row(store: Store, name: str) -> dict[str, Any]:
    """The row of the autoencoder called `name`, or with that `sae_id`.

    Raises:
        InputError: there is none, with those there are.
    """
    query = "SELECT * FROM saes WHERE name = $name OR CAST(sae_id AS VARCHAR) = $name"
    found = store.sql(query, {"name": str(name)}).to_arrow_table().to_pylist()
    if not found:
        names = ", ".join(str(row["name"]) for row in sae_rows(store))
        raise InputError(
            f"there is no autoencoder {name!r} in {store.path}",
            expected=f"one of {names}" if names else None,
            fix=None if names else "train one: moescope sae train, or ms.sae.train(run, store, specs, site=...)",
        )
    return _read(found[0])


def check_sae_names(store: Store, names: Sequence[str]) -> None:
    """Refuse names that no autoencoder can take: empty, twice, or taken."""
    taken = {str(row["name"]) for row in sae_rows(store)}
    for place, name in enumerate(names):
        if not name.strip() or whole_characters(name) != name:
            raise InputError("an autoencoder needs a name of Unicode text", found=repr(name))
        if name in taken or name in names[:place]:
            why = "the store has an autoencoder of that name" if name in taken else "two were given that name"
            raise InputError(f"{why}: {name!r}", fix="choose another name, or delete the old one: moescope sae delete")


def free_sae_name(store: Store, name: str, beside: Sequence[str] = ()) -> str:
    """`name`, numbered where it is taken."""
    taken = {str(row["name"]) for row in sae_rows(store)} | set(beside)
    numbered = (f"{name}-{n}" for n in range(2, len(taken) + 3))
    return name if name not in taken else next(n for n in numbered if n not in taken)


def add_sae(store: Store, row: Mapping[str, Any], write: Callable[[Path], Mapping[str, Any] | None]) -> dict[str, Any]:
    """Write an autoencoder's files into its folder beside the store, then its row; both or neither.

    Args:
        store: open for writing.
        row: columns of `saes`; `sae_id` and `created_at` are made where they are missing, path and checksum are found.
        write: writes the files of SAELens' format into the folder it is given, and gives columns known only then, or None.

    Returns:
        The row as it is stored.

    Raises:
        InputError: the name is taken, or the store is open for reading only.
        RunError: the disk failed; nothing of it is kept.
    """
    if store.read_only:
        raise InputError(f"{store.path} is open for reading only", fix="open it with Store(path)")
    check_sae_names(store, [str(row["name"])])
    sae_id = str(row.get("sae_id") or uuid.uuid4())
    folder = saes_folder(store.path) / sae_id
    with folder_written_whole(folder) as partial:
        late = write(partial) or {}
        checksum, configuration = file_digest(partial / WEIGHTS), file_digest(partial / CONFIG)
    whole: dict[str, Any] = {
        "created_at": datetime.now(UTC).replace(tzinfo=None),
        "versions": {**library_versions(), "sae_lens": version("sae_lens")},
        **row,
        **late,
        "sae_id": sae_id,
        "path": folder.relative_to(store.path.parent).as_posix(),
        "checksum": checksum,
    }
    whole["settings"] = {**(whole.get("settings") or {}), "configuration_checksum": configuration}
    stored = {key: to_json(value) if key in _JSON_COLUMNS else value for key, value in whole.items()}
    try:
        write_rows(store, {"saes": [stored]})
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return sae_row(store, sae_id)


def rename_sae(store: Store, name: str, new: str) -> None:
    """Give an autoencoder another name.

    Args:
        store: open for writing.
        name: of the autoencoder, or its id.
        new: the name it gets.

    Raises:
        InputError: there is none of that name, the new one is taken, or the store is open for reading only.
    """
    row = sae_row(store, name)
    if store.read_only:
        raise InputError(f"{store.path} is open for reading only", fix="open it with Store(path)")
    if new != row["name"]:
        check_sae_names(store, [new])
        store.connection.execute("UPDATE saes SET name = ? WHERE sae_id = ?", [new, row["sae_id"]])


def delete_saes(store: Store, names: Sequence[str]) -> DeletedSaes:
    """Delete autoencoders: their rows in every table, in one transaction, and their folders.

    Args:
        store: open for writing.
        names: their names or ids.

    Raises:
        InputError: there is none of a name, or the store is open for reading only. Nothing is deleted.
        RunError: the rows could not be deleted, and nothing was; or they are deleted, but files could not be.
    """
    rows = [sae_row(store, name) for name in names]
    if store.read_only:
        raise InputError(f"{store.path} is open for reading only", fix="open it with Store(path)")
    tables = [table.name for table in TABLES if any(column.name == "sae_id" for column in table.columns)]
    deleted: dict[str, int] = {}
    connection = store.connection
    try:
        with transaction(connection):
            for row in rows:
                for table, of in _NAMED_ELSEWHERE.items():
                    query = f'DELETE FROM "{table}" WHERE {of}'  # noqa: S608  both are constants
                    found = connection.execute(query, [row["sae_id"]]).fetchall()
                    deleted[table] = deleted.get(table, 0) + int(found[0][0])
                for table in tables:
                    query = f'DELETE FROM "{table}" WHERE sae_id = ?'  # noqa: S608  names of tables are the schema's
                    found = connection.execute(query, [row["sae_id"]]).fetchall()
                    deleted[table] = deleted.get(table, 0) + int(found[0][0])
    except duckdb.Error as refused:
        raise RunError(
            "the autoencoders could not be deleted", found=str(refused), fix="nothing was deleted; free some space"
        ) from refused
    with suppress(duckdb.Error):  # while others write, blocks become free at the next checkpoint instead
        connection.execute("CHECKPOINT")
    freed = sum(_delete_folder(store, row) for row in rows)
    return DeletedSaes({table: count for table, count in deleted.items() if count}, freed)


def export_sae(store: Store, name: str, folder: Path) -> list[Path]:
    """Copy an autoencoder's files into a folder of its own, which SAELens opens as it is; gives the files.

    Args:
        store: that holds it.
        name: of the autoencoder, or its id.
        folder: to be made.

    Raises:
        InputError: there is none of that name, or the folder is there already.
        StoreError: its files are missing, or its weights are not those that were written.
    """
    row = sae_row(store, name)
    check_files(store, row)
    if folder.exists():
        raise InputError(
            f"cannot write {folder}", found="something of that name", fix="name a folder that is not there yet"
        )
    with folder_written_whole(folder) as partial:
        for file in (CONFIG, WEIGHTS):
            shutil.copyfile(folder_of(store, row) / file, partial / file)
    return [folder / file for file in (CONFIG, WEIGHTS)]


def check_files(store: Store, row: Mapping[str, Any]) -> None:
    """Hold an autoencoder's files against its row.

    Raises:
        StoreError: one is missing, or not the one that was written.
    """
    folder = folder_of(store, row)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise StoreError(
                f"{folder / file} is missing", fix="keep the folder of autoencoders beside the store when you move it"
            )
    expected = {WEIGHTS: row["checksum"], CONFIG: (row.get("settings") or {}).get("configuration_checksum")}
    for file, checksum in expected.items():
        if checksum is not None and (found := file_digest(folder / file)) != checksum:
            raise StoreError(
                f"{folder / file} is not the file that was written",
                expected=f"SHA-256 {checksum}",
                found=found,
                fix="restore it from a copy, or train it again",
            )


def folder_of(store: Store, row: Mapping[str, Any]) -> Path:
    """Where the weights of a row lie."""
    return store.path.parent / str(row["path"])


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def folder_written_whole(target: Path) -> Iterator[Path]:
    """Give an empty folder beside `target` to write into; on success it takes the target's place, else it is removed.

    Raises:
        InputError: the folder above cannot be written.
        RunError: the disk failed.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        for file in partial.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())  # it outlives a power cut before anything names it
        _put(partial, target)
    except PermissionError as refused:
        raise InputError(
            f"cannot write {target}", found="no permission", fix="choose a folder you may write to"
        ) from refused
    except OSError as refused:
        raise RunError(
            f"{target} could not be written",
            found=str(refused),
            fix="free some space on the disk; nothing is kept of it",
        ) from refused
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put(partial: Path, target: Path) -> None:
    """Rename; a folder that is there already is first set aside, then removed."""
    if not target.exists():
        partial.rename(target)
        return
    aside = target.with_name(f".{target.name}.{os.getpid()}.old")
    shutil.rmtree(aside, ignore_errors=True)
    target.rename(aside)
    partial.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def _delete_folder(store: Store, row: Mapping[str, Any]) -> int:
    folder = folder_of(store, row)
    # A store from elsewhere could name any folder: only one that is named after the autoencoder, beside the store, goes.
    ours = folder.name == str(row["sae_id"]) and folder.resolve().parent.parent == store.path.parent.resolve()
    if not ours or not folder.is_dir() or folder.is_symlink():
        return 0
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    try:
        shutil.rmtree(folder)
    except OSError as refused:
        raise RunError(
            f"autoencoder {row['name']!r} is deleted, but its files are not",
            found=str(refused),
            fix=f"delete {folder} yourself",
        ) from refused
    with suppress(OSError):  # the folder of all autoencoders goes with the last of them
        folder.parent.rmdir()
    return size


def _read(row: dict[str, Any]) -> dict[str, Any]:
    uuids = {key: str(row[key]) if row[key] is not None else None for key in ("sae_id", "trained_on")}
    return {**row, **uuids, **{key: json.loads(row[key]) if row[key] else {} for key in _JSON_COLUMNS}}
