"""What happens on a disk that fills, on a real one: run in a process of its own that has mounted a small tmpfs.

    unshare --map-root-user --mount sh -c 'mount -t tmpfs -o size=16m none FOLDER && exec python full_disk.py SCENARIO FOLDER'

A scenario leaves with an error where something is not as it must be; `more_room` stands for the user who frees some.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from moescope.core.errors import MoescopeError, RunError, StoreError
from moescope.store.coverage import Expectation
from moescope.store.ending import end_run
from moescope.store.merging import merge
from moescope.store.run import Run
from moescope.store.store import Store
from moescope.store.vector_shards import VectorRows
from moescope.store.writer import BatchRecords, RunWriter

TOKENS, LAYERS = 4096, 4


def batch(number: int, *, vectors: bool = False) -> BatchRecords:
    """A batch of one sequence, of noise, so that nothing compresses."""
    random = np.random.default_rng(number)
    token = np.arange(number * TOKENS, (number + 1) * TOKENS)
    rows = TOKENS * LAYERS
    offsets = pa.array(np.arange(0, 8 * rows + 1, 8, dtype=np.int32))
    routing = {
        "token": np.tile(token, LAYERS),
        "layer": np.repeat(np.arange(LAYERS, dtype=np.uint16), TOKENS),
        "block": ["mlp"] * rows,
        "experts": pa.ListArray.from_arrays(offsets, pa.array(random.integers(0, 64, 8 * rows), pa.uint16())),
        "weights": pa.ListArray.from_arrays(offsets, pa.array(random.random(8 * rows, np.float32))),
    }
    sequences = {"sequence_id": [number], "document_id": [number], "n_tokens": pa.array([TOKENS], pa.int32())}
    tokens = {"token": token, "sequence_id": np.full(TOKENS, number), "position": np.arange(TOKENS, dtype=np.int32)}
    tables = {"routing": pa.table(routing), "tokens": pa.table(tokens), "sequences": pa.table(sequences)}
    found = BatchRecords(number, (number, 1, TOKENS), tables)
    if vectors:
        values = random.random((TOKENS, 256), np.float32)
        found.tables = {"sequences": pa.table(sequences)}
        found.vectors = [VectorRows("blocks.0.hook_resid_post", "float32", values, token, None, TOKENS)]
    return found


def write(store: Store, name: str, batches: int, *, vectors: bool = False, chunk_rows: int = 60_000) -> Run:
    run = store.begin_run(name=name, corpus_fingerprint="f" * 64)
    writer = RunWriter(store, run.run_id, chunk_rows=chunk_rows)
    try:
        for number in range(batches):
            writer.submit(lambda number=number: batch(number, vectors=vectors))  # type: ignore[misc]
        writer.close()
    except RunError:
        end_run(store, run, [], {}, failed=True)
        raise
    return run


def done(run: Run) -> Run:
    counted = [Expectation("tokens", run.rows("tokens"), "SELECT count(*) FROM tokens WHERE run_id = $run")]
    end_run(run.store, run, counted, {"tokens": run.rows("tokens"), "documents": run.rows("batches")}, failed=False)
    return run


def fill(folder: Path, *, leave: int) -> None:
    """Leave so many bytes."""
    statistics = subprocess.check_output(["df", "-B1", "--output=avail", str(folder)], text=True)
    with (folder / "filler").open("wb") as file:
        file.write(bytes(max(0, int(statistics.split()[1]) - leave)))


def more_room(folder: Path) -> None:
    (folder / "filler").unlink(missing_ok=True)
    subprocess.run(["mount", "-o", "remount,size=128m", str(folder)], check=True)


def whole(run: Run) -> int:
    """Check that only whole batches lie there, and count them."""
    kept = run.rows("batches")
    assert run.rows("tokens") == kept * TOKENS, (run.rows("tokens"), kept)
    assert run.rows("routing") == kept * TOKENS * LAYERS
    assert run.rows("sequences") == kept
    assert run.sql("SELECT count(*), sum(len(experts)), sum(len(weights)) FROM routing WHERE run_id = $run").fetchall()
    return kept


def recording(folder: Path) -> None:
    with Store(folder / "runs.duckdb") as store:
        with pytest.raises(RunError, match=r"the disk is full.*free some space"):
            write(store, "filling", 100)
        with pytest.raises(
            StoreError, match=r"No space left.*free some space.*open it again: what was committed is whole"
        ):
            store.runs()
    more_room(folder)
    with Store(folder / "runs.duckdb") as store:
        assert store.run("filling").status == "incomplete"
        before = whole(store.run("filling"))
        assert 0 < before < 100
        assert whole(write(store, "second", 3)) == 3
        assert whole(store.run("filling")) == before


def vectors(folder: Path) -> None:
    with Store(folder / "runs.duckdb") as store:
        with pytest.raises(RunError, match=r"the disk is full.*free some space"):
            write(store, "filling", 40, vectors=True, chunk_rows=2)
        run = store.run("filling")
        for path, rows in run.sql("SELECT path, rows FROM activations WHERE run_id = $run").fetchall():
            assert (folder / path).stat().st_size > rows * 256 * 4
        assert not list(folder.rglob("*.tmp*")), "half-written files"


def making(folder: Path) -> None:
    fill(folder, leave=20_000)
    with pytest.raises(StoreError, match=r"cannot be written: the disk is full.*free some space"):
        Store(folder / "runs.duckdb")
    more_room(folder)
    with Store(folder / "runs.duckdb") as store:
        assert store.runs() == []


def importing(folder: Path) -> None:
    rows = 60_000
    random = np.random.default_rng(0)
    trace = pa.table(
        {
            "sequence_id": np.arange(rows) // 500, "position": np.arange(rows) % 500, "layer": np.zeros(rows, int),
            "experts": pa.array(list(np.argsort(random.random((rows, 64)))[:, :8])),
            "weights": pa.array(list(np.sort(random.random((rows, 8), np.float32))[:, ::-1].copy())),
        }
    )  # fmt: skip
    with Store(folder / "runs.duckdb") as store:
        fill(folder, leave=2_000_000)
        with pytest.raises(RunError, match=r"the disk is full.*nothing was written"):
            store.import_trace(trace, name="trace", n_experts=64)
        assert store.runs() == []
        more_room(folder)
        assert store.import_trace(trace, name="trace", n_experts=64).complete


def merging(folder: Path) -> None:
    with Store(folder / "shard.duckdb") as store:
        done(write(store, "base", 6))
    fill(folder, leave=2_000_000)
    with pytest.raises(MoescopeError, match=r"no room for the merged run.*No space left.*free some space"):
        merge(folder / "runs.duckdb", [folder / "shard.duckdb"])
    with Store(folder / "shard.duckdb", read_only=True) as store:
        assert whole(store.run("base")) == 6


def compacting(folder: Path) -> None:
    with Store(folder / "runs.duckdb") as store:
        done(write(store, "kept", 4))
        done(write(store, "dropped", 4))
        fill(folder, leave=0)
        with pytest.raises(RunError, match=r"nothing was deleted; free some space"):
            store.delete_run("dropped")
        assert whole(store.run("dropped")) == 4
    (folder / "filler").unlink()
    with Store(folder / "runs.duckdb") as store:
        store.delete_run("dropped")
        store.connection.execute("CHECKPOINT")
        fill(folder, leave=300_000)
        with pytest.raises(StoreError, match=r"room|space"):
            store.compact()
        assert whole(store.run("kept")) == 4
        more_room(folder)
        store.compact()
        assert whole(store.run("kept")) == 4


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
