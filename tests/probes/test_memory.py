"""Memory does not grow with the corpus."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moescope.probes.batches import Batch, BatchPlan
from moescope.store.writer import RunWriter

# Records the corpus argv[1] with the model argv[2] into argv[3] and prints tokens and peak resident memory in KiB.
# argv[4] == "leak" keeps every record that was written, as a leak would.
RECORDING = """
import re, sys
from pathlib import Path
import moescope as ms
from moescope.store.writer import RunWriter

if sys.argv[4] == "leak":
    plain, kept = RunWriter._commit, []
    def commit(self):
        kept.extend(self._pending)
        plain(self)
    RunWriter._commit = commit
with ms.Store(sys.argv[3]) as store:
    run = ms.record(ms.load(sys.argv[2]), ms.Corpus.load(sys.argv[1]), store, name="run", progress=False)
    # Not ru_maxrss: a process starts with that of the one it was forked from.
    peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]
    print(run.status, run.info["summary"]["tokens"], peak)
"""


def write_corpus(path: Path, tokens: int) -> Path:
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(tokens // 500):
            file.write(json.dumps({"token_ids": draw.choices(range(1, 97), k=500)}) + "\n")
    return path


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_ten_times_the_tokens_take_no_more_memory_than_the_stores_cache_may_hold(
    tmp_path: Path, tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both runs are longer than two chunks of the writer, so that they differ in length alone, and in how full the cache is."""
    tiny_model("qwen3_moe", max_position_embeddings=512).save_pretrained(tmp_path / "model")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")  # the allocator's own sprawl is not what is measured

    def peak_kib(tokens: int, mode: str) -> int:
        corpus = write_corpus(tmp_path / f"{tokens}.jsonl", tokens)
        store = tmp_path / f"{tokens}-{mode}.duckdb"
        command = [sys.executable, "-c", RECORDING, str(corpus), str(tmp_path / "model"), str(store), mode]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
        assert done.returncode == 0, done.stderr
        status, recorded, peak = done.stdout.split()
        assert (status, int(recorded)) == ("complete", tokens)
        return int(peak)

    small, large, leaking = peak_kib(250_000, "plain"), peak_kib(2_500_000, "plain"), peak_kib(2_500_000, "leak")
    cache = 128 << 10  # KiB: what the store lets DuckDB hold
    assert leaking > small + cache, "a leak would not have been noticed"
    assert large <= small + cache


def test_no_more_than_a_few_batches_are_alive_at_once(
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However slow the disk: the model waits for the writer, and what is written is let go."""
    alive: list[weakref.ref[Batch]] = []
    most = 0
    plain_walk, plain_commit = BatchPlan.__iter__, RunWriter._commit

    def walk(self: BatchPlan) -> Iterator[Batch]:
        nonlocal most
        for batch in plain_walk(self):
            alive.append(weakref.ref(batch))
            most = max(most, sum(reference() is not None for reference in alive))
            yield batch

    def slow_commit(self: RunWriter) -> None:
        time.sleep(0.02)
        plain_commit(self)

    monkeypatch.setattr(BatchPlan, "__iter__", walk)
    monkeypatch.setattr(RunWriter, "_commit", slow_commit)
    monkeypatch.setitem(RunWriter.__init__.__kwdefaults__, "chunk_rows", 1)
    assert record_ids(tiny_model("llama"), token_ids([4] * 24), batch_size=1).status == "complete"
    assert len(alive) >= 24
    assert 2 <= most <= 8
