"""Vectors beside a store: read back by this package and by safetensors, whole or refused."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from moescope.core.errors import InputError, RunError, StoreError
from moescope.store import writer as writer_module
from moescope.store.run import Run
from moescope.store.store import Store
from moescope.store.vector_shards import VectorRows, vectors_folder
from moescope.store.vectors import vector_shards, vector_sites
from moescope.store.writer import BatchRecords, RunWriter

SITE, SLOTS = "blocks.0.hook_resid_post", "blocks.1.mlp.experts.hook_out"


@pytest.fixture
def run(store: Store) -> Run:
    return store.begin_run(
        name="run", model="m", revision=None, architecture="A", settings={}, versions={}, seed=0,
        corpus_fingerprint="f", anatomy={},
    )  # fmt: skip


def vectors(number: int, rows: int, dtype: str = "float32", site: str = SITE) -> VectorRows:
    drawn = np.random.default_rng(number).normal(size=(rows, 3, 4))
    raw = drawn.astype(np.float32).view(np.uint32) >> 16 if dtype == "bfloat16" else drawn.astype(dtype)
    raw = raw.astype(np.uint16) if dtype == "bfloat16" else raw
    expert = np.arange(rows, dtype=np.int32) % 5 if site == SLOTS else None
    return VectorRows(site, dtype, raw, np.arange(rows, dtype=np.int64) + 100 * number, expert, rows)


def written(store: Store, run: Run, batches: list[list[VectorRows]], **limits: Any) -> None:
    writer = RunWriter(store, run.run_id, **limits)
    for number, rows in enumerate(batches):
        writer.submit(lambda number=number, rows=rows: BatchRecords(number, (number, 1, 1), vectors=rows))
    writer.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_vectors_come_back_as_they_were_written(dtype: str, store: Store, run: Run) -> None:
    parts = [vectors(n, rows, dtype, site) for n, (rows, site) in enumerate([(3, SITE), (2, SLOTS), (4, SITE)])]
    written(store, run, [parts[:2], parts[2:]])
    assert vector_sites(run) == [SITE, SLOTS]
    for site in (SITE, SLOTS):
        mine = [part for part in parts if part.site == site]
        (shard,) = vector_shards(run, site, verify=True)
        assert shard.dtype == dtype
        assert np.array_equal(shard.raw, np.concatenate([part.vectors for part in mine]))
        assert shard.token.tolist() == [token for part in mine for token in part.token.tolist()]
        assert (None if shard.expert is None else shard.expert.tolist()) == ([0, 1] if site == SLOTS else None)
        assert isinstance(shard.raw, np.memmap), "nothing is read until it is looked at"


def test_the_catalogue_says_what_lies_where(store: Store, run: Run) -> None:
    written(store, run, [[vectors(0, 3), vectors(1, 2, site=SLOTS)], [vectors(2, 4)]], chunk_seconds=0.0)
    rows = store.fetch(
        "SELECT site, shard, path, rows, width, dtype, tokens, checksum FROM activations WHERE run_id = ? ORDER BY ALL",
        [run.run_id],
    )
    folder = f"runs.vectors/{run.run_id}"
    assert [row[:-1] for row in rows] == [
        (SITE, 0, f"{folder}/{SITE}/00000.safetensors", 3, 12, "float32", 3),
        (SITE, 1, f"{folder}/{SITE}/00001.safetensors", 4, 12, "float32", 4),
        (SLOTS, 0, f"{folder}/{SLOTS}/00000.safetensors", 2, 12, "float32", 2),
    ]
    for row in rows:
        assert hashlib.sha256((store.path.parent / row[2]).read_bytes()).hexdigest() == row[-1]
    assert [len(shard.raw) for shard in vector_shards(run, SITE)] == [3, 4]


def test_safetensors_itself_reads_the_shards(store: Store, run: Run) -> None:
    part = vectors(0, 5, "float16", SLOTS)
    written(store, run, [[part]])
    (shard,) = vector_shards(run, SLOTS)
    found = safetensors.numpy.load_file(shard.path)
    assert set(found) == {"vectors", "token", "expert"}
    assert np.array_equal(found["vectors"], part.vectors)
    assert np.array_equal(found["token"], part.token)
    assert np.array_equal(found["expert"], part.expert)
    with safetensors.safe_open(shard.path, "np") as opened:
        assert opened.metadata() == {"run_id": run.run_id, "site": SLOTS}


def test_narrow_vectors_become_float32_exactly(store: Store, run: Run) -> None:
    import torch

    values = torch.tensor([[1.0, -0.0, 3.14159, float("inf")], [1e-40, -2.5, 65504.0, 0.1]])
    bits = values.bfloat16().view(torch.int16).numpy().view(np.uint16)
    token = np.arange(2, dtype=np.int64)
    written(store, run, [[VectorRows(SITE, "bfloat16", bits, token, None, 2)]])
    (shard,) = vector_shards(run, SITE)
    assert np.array_equal(shard.float32(), values.bfloat16().float().numpy())
    written(store, run, [[VectorRows(SLOTS, "float16", values.half().numpy(), token, None, 2)]])
    (shard,) = vector_shards(run, SLOTS)
    assert np.array_equal(shard.float32(), values.half().float().numpy())


def test_waiting_vectors_are_written_before_they_fill_memory(
    store: Store, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = vectors(0, 10)
    monkeypatch.setattr(writer_module, "CHUNK_VECTOR_BYTES", 3 * part.nbytes)
    written(store, run, [[vectors(n, 10)] for n in range(7)])
    assert [len(shard.raw) for shard in vector_shards(run, SITE)] == [30, 30, 10]


def test_a_chunk_that_fails_names_no_shard(store: Store, run: Run) -> None:
    """Its files may lie there; the catalogue, which is part of the transaction, does not know them."""
    import pyarrow as pa

    bad = BatchRecords(1, (1, 1, 1), {"sequences": pa.table({"sequence_id": ["no number"]})}, vectors=[vectors(1, 2)])
    writer = RunWriter(store, run.run_id, chunk_seconds=0.0)
    writer.submit(lambda: BatchRecords(0, (0, 1, 1), vectors=[vectors(0, 3)]))
    writer.submit(lambda: bad)
    with pytest.raises(RunError):
        writer.close()
    assert [len(shard.raw) for shard in vector_shards(run, SITE, verify=True)] == [3]
    assert store.fetch("SELECT batch FROM batches") == [(0,)]


def damaged(run: Run, how: str) -> None:
    (shard,) = vector_shards(run, SITE)
    path, whole = shard.path, shard.path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        changed = {"cut": whole[:-1], "other": b"no shard at all", "bit": whole[:-1] + bytes([whole[-1] ^ 1])}
        path.write_bytes(changed[how])


@pytest.mark.parametrize(
    ("how", "message"), [("missing", "is missing"), ("cut", "is not whole"), ("other", "is not a shard")]
)
def test_a_damaged_shard_is_refused(how: str, message: str, store: Store, run: Run) -> None:
    written(store, run, [[vectors(0, 3)]])
    damaged(run, how)
    with pytest.raises(StoreError, match=message):
        list(vector_shards(run, SITE))


def test_a_changed_bit_is_found_on_demand(store: Store, run: Run) -> None:
    written(store, run, [[vectors(0, 3)]])
    damaged(run, "bit")
    assert len(list(vector_shards(run, SITE))) == 1
    with pytest.raises(StoreError, match="not the file that was recorded"):
        list(vector_shards(run, SITE, verify=True))


def test_a_site_without_vectors_is_named_with_those_that_have_some(store: Store, run: Run) -> None:
    written(store, run, [[vectors(0, 3)]])
    with pytest.raises(InputError, match=r"blocks\.9\.hook_resid_post.*blocks\.0\.hook_resid_post"):
        list(vector_shards(run, "blocks.9.hook_resid_post"))


def test_no_half_written_file_is_left(store: Store, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    written(store, run, [[vectors(0, 3)]])
    folder = vectors_folder(store.path, run.run_id)
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["00000.safetensors"]
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(RunError, match="the disk is full"):
        written(store, run, [[vectors(1, 3, site=SLOTS)]])
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["00000.safetensors"]


def test_a_shard_is_on_the_disk_before_it_has_its_name(store: Store, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, rename = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("synced"), sync(file))[1])
    monkeypatch.setattr(Path, "replace", lambda path, target: (done.append("named"), rename(path, target))[1])
    written(store, run, [[vectors(0, 3)]])
    assert done == ["synced", "named"]
