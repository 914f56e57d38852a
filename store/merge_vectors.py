"""Vectors of shards brought beside the merged store: their files written anew, since they hold token numbers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.store.merge_plan import MergePlan, Part
from moescope.store.merge_shards import Shard
from moescope.store.store import Store
from moescope.store.vector_shards import VectorRows, vectors_folder, write_shards
from moescope.store.vectors import vector_shards, vector_sites


@dataclass(frozen=True)
class _Moves:
    """How token numbers of a shard move: from `start[i]` on by `shift[i]`."""

    start: NDArray[np.int64]
    shift: NDArray[np.int64]

    def moved(self, token: NDArray[np.int64]) -> NDArray[np.int64]:
        where = np.searchsorted(self.start, token, side="right") - 1
        found: NDArray[np.int64] = token + self.shift[where]
        return found


def carry_vectors(connection: duckdb.DuckDBPyConnection, target: Path, run_id: str, plan: MergePlan) -> Iterator[str]:
    """Write the vectors of every shard beside the merged store, a file at a time, and catalogue them; gives what comes next.

    Every file is checked against its checksum. If the merge fails afterwards, `drop_vectors` takes them away.

    Raises:
        InputError: a shard with vectors overlaps others: a file holds several batches, and its catalogue counts them together.
        StoreError: a file is missing or damaged.
    """
    counts: dict[str, int] = {}
    for part in sorted((p for p in plan.parts if p.taken), key=lambda p: p.taken[0].number):
        with Store(part.shard.path, read_only=True) as source:
            run = source.run(part.shard.run_id)
            sites = vector_sites(run)
            if sites and part.left:
                raise _overlapping(part)
            tokens = run.sql("SELECT site, tokens FROM activations WHERE run_id = $run ORDER BY site, shard").fetchall()
            for site in sites:
                sizes = [int(count) for name, count in tokens if name == site]
                for file, size in zip(vector_shards(run, site, verify=True), sizes, strict=True):
                    yield f"vectors {file.path.name} of {site}, {part.shard.path.name}"
                    rows = VectorRows(
                        site, file.dtype, file.raw, _moves(part.shard, plan).moved(file.token), file.expert, size
                    )
                    _catalogue(connection, run_id, write_shards(target, run_id, [rows], counts))


def drop_vectors(target: Path, run_id: str) -> None:
    """Take away what a merge that failed has written."""
    folder = vectors_folder(target, run_id)
    shutil.rmtree(folder, ignore_errors=True)
    if folder.parent.is_dir() and not any(folder.parent.iterdir()):
        folder.parent.rmdir()


def _moves(shard: Shard, plan: MergePlan) -> _Moves:
    found = [(s.token_range[0], s.shift) for s in plan.segments if s.shard is shard]
    return _Moves(np.array([start for start, _ in found]), np.array([shift for _, shift in found]))


def _catalogue(connection: duckdb.DuckDBPyConnection, run_id: str, rows: pa.Table | None) -> None:
    if rows is None:
        return
    names = ", ".join(f'"{name}"' for name in rows.column_names)
    connection.register("moescope_rows", rows)
    connection.execute(f"INSERT INTO activations (run_id, {names}) SELECT ?, {names} FROM moescope_rows", [run_id])
    connection.unregister("moescope_rows")


def _overlapping(part: Part) -> InputError:
    return InputError(
        f"{part.shard.path} has vectors, and {len(part.left)} of its batches are in other shards too",
        expected="shards with vectors that have no batch in common",
        fix="leave it out and record the batches that are then missing, or leave out the others",
    )
