"""Workers on a real Ray: the same rows as one recording, whoever dies on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import moescope as ms
from moescope.core.errors import InputError, RunError
from moescope.probes.workers import record_with_workers as module
from moescope.probes.workers.pool import WorkerPool
from moescope.probes.workers.ray_cluster import Share, import_ray, share_of
from moescope.probes.workers.record_with_workers import record_with_workers
from moescope.store.run import Run
from moescope.store.schema import TABLES
from moescope.store.store import Store

OPTIONS: dict[str, Any] = {"batch_size": 4, "max_length": 64, "sites": ["blocks.2.hook_resid_post"], "sample": 0.1}


@pytest.fixture(scope="module")
def ray_here() -> Iterator[Any]:
    """One Ray for the tests of this file: what is running already is used, and left running."""
    pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = import_ray()
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=128 << 20)
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def corpus() -> list[dict[str, Any]]:
    """The first texts of the bundled corpus, labelled."""
    documents = list(ms.Corpus.load("demo"))[:40]
    return [{"text": document.text, "label": document.label} for document in documents]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As many threads as each worker has: the last bits of logits depend on the number."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone(
    demo_model: Any, corpus: list[dict[str, Any]], one_thread: None, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What one recording of the corpus gives."""
    with Store(tmp_path_factory.mktemp("alone") / "runs.duckdb") as store:
        return contents(ms.record(demo_model, corpus, store, name="base", progress=False, **OPTIONS))


def contents(run: Run) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table, without what differs from run to run; vectors are counted."""
    found = {}
    for table in TABLES:
        if table.name not in ("runs", "activations") and "run_id" in {column.name for column in table.columns}:
            query = f'SELECT * EXCLUDE (run_id) FROM "{table.name}" WHERE run_id = ? ORDER BY ALL'
            found[table.name] = run.store.fetch(query, [run.run_id])
    columns = "name, model, revision, settings, versions, seed, corpus_fingerprint, status, anatomy"
    found["runs"] = run.store.fetch(f"SELECT {columns} FROM runs WHERE run_id = ?", [run.run_id])
    query = "SELECT site, sum(rows), sum(tokens) FROM activations WHERE run_id = ? GROUP BY site"
    found["activations"] = run.store.fetch(query, [run.run_id])
    return found


def with_workers(store: Store, corpus: Any, **options: Any) -> Run:
    given = {"name": "base", "workers": 2, "threads": 1, "progress": False, "batches_a_task": 3, **OPTIONS}
    return record_with_workers("demo", corpus, store, **{**given, **options})


def assert_tidy(folder: Path) -> None:
    """Nothing lies beside the store, which may still be open, but its vectors."""
    assert {path.name for path in folder.iterdir()} <= {"runs.duckdb", "runs.duckdb.wal", "runs.vectors"}


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_rows_are_those_of_one_recording(
    workers: int, ray_here: Any, store: Store, corpus: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    run = with_workers(store, corpus, workers=workers)
    found = contents(run)
    for table, rows in alone.items():
        assert found[table] == rows, table
    assert found["runs"][0][7] == "complete"
    assert run.info["summary"]["workers"] == workers
    assert len(found["batches"]) > 6
    assert_tidy(store.path.parent)


@pytest.mark.slow
def test_a_killed_worker_changes_no_row(
    ray_here: Any,
    store: Store,
    corpus: list[dict[str, Any]],
    alone: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two workers are killed with SIGKILL in the middle of a task, each at another place of the run."""
    replaced = []
    plain = WorkerPool._replace

    def counting(self: WorkerPool, was: Any, tasks: Any, reason: str) -> None:
        replaced.append(was.task)
        plain(self, was, tasks, reason)

    monkeypatch.setattr(WorkerPool, "_replace", counting)
    stop = threading.Event()
    killer = threading.Thread(target=_kill_recorders, args=(store.path.parent, 2, stop))
    killer.start()
    try:
        run = with_workers(store, corpus, batches_a_task=2)
    finally:
        stop.set()
        killer.join()
    assert len(replaced) == 2
    assert all(task is not None for task in replaced)
    found = contents(run)
    for table, rows in alone.items():
        assert found[table] == rows, table
    assert_tidy(store.path.parent)


def _kill_recorders(folder: Path, times: int, stop: threading.Event) -> None:
    """Kill whoever is recording when new shards show up: a shard's file is made when its task begins."""
    seen: set[str] = set()
    for _ in range(times):
        while not stop.is_set():
            shards = {path.name for path in folder.rglob("batches-*.duckdb")} - seen
            busy = [p for p in psutil.Process().children(recursive=True) if _is_recording(p)]
            if shards and busy:
                seen |= shards
                busy[0].send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        time.sleep(0.5)


def _is_recording(process: psutil.Process) -> bool:
    try:
        return "ray::ShardWorker.record" in " ".join(process.cmdline())
    except psutil.Error:
        return False


@pytest.mark.slow
def test_what_a_worker_refuses_is_told_here(ray_here: Any, store: Store, corpus: list[dict[str, Any]]) -> None:
    with pytest.raises(InputError, match=r"blocks\.99"):
        with_workers(store, corpus, sites=["blocks.99.hook_resid_post"])
    assert store.runs() == []
    assert_tidy(store.path.parent)


@pytest.mark.slow
def test_a_failure_on_the_way_leaves_what_was_recorded(
    ray_here: Any, store: Store, corpus: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = WorkerPool._take

    def breaking(self: WorkerPool, reference: Any, tasks: Any, done: Any) -> None:
        if len(list(store.path.parent.rglob("batches-*.duckdb"))) >= 4:
            raise RunError("the cluster went away")
        plain(self, reference, tasks, done)

    monkeypatch.setattr(WorkerPool, "_take", breaking)
    with pytest.raises(RunError, match="the cluster went away"):
        with_workers(store, corpus, batches_a_task=2)
    run = store.run("base")
    assert run.status == "incomplete"
    assert "the cluster went away" in run.info["summary"]["stopped"]
    assert "no shard" in run.info["summary"]["stopped"]
    assert run.rows("batches") >= 2
    assert_tidy(store.path.parent)


_INTERRUPTED = """
import sys, pathlib, threading, time, os, signal
import moescope as ms
from moescope.probes.workers.record_with_workers import record_with_workers
folder = pathlib.Path(sys.argv[1])
def interrupt():
    while len(list(folder.rglob("batches-*.duckdb"))) < 4:
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)
if __name__ == "__main__":
    threading.Thread(target=interrupt, daemon=True).start()
    with ms.Store(folder / "runs.duckdb") as store:
        record_with_workers("demo", "demo", store, name="base", workers=2, threads=1, batches_a_task=2)
"""


@pytest.mark.slow
def test_ctrl_c_stops_everything_and_keeps_what_was_recorded(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    code = tmp_path / "code" / "run.py"
    code.parent.mkdir()
    code.write_text(_INTERRUPTED)
    folder = tmp_path / "out"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, str(code), str(folder)], capture_output=True, text=True, timeout=180, check=False
    )
    assert "KeyboardInterrupt" in done.stderr
    left = [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]
    assert left == []
    assert_tidy(folder)
    with Store(folder / "runs.duckdb", read_only=True) as store:
        run = store.run("base")
        assert run.status == "incomplete"
        assert run.info["summary"]["stopped"].startswith("interrupted; no shard")
        tokens = run.rows("tokens")
        assert tokens > 0
        assert store.fetch("SELECT count(*), min(token), max(token) FROM tokens") == [(tokens, 0, tokens - 1)]


_CLUSTER = """
import sys, pathlib
from ray.cluster_utils import Cluster
import moescope as ms
from moescope.probes.workers.record_with_workers import record_with_workers
if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    try:
        with ms.Store(pathlib.Path(sys.argv[1]) / "runs.duckdb") as store:
            run = record_with_workers(
                "demo", "demo", store, name="base", workers=2, threads=1, ray_address=cluster.address, progress=False
            )
            print(run.status, run.rows("sequences"))
    finally:
        cluster.shutdown()
"""


@pytest.mark.slow
def test_a_cluster_of_two_nodes_records_too(tmp_path: Path) -> None:
    """Two nodes of Ray on this machine; each worker takes the only CPU of one of them."""
    pytest.importorskip("ray")
    code = tmp_path / "run.py"
    code.write_text(_CLUSTER)
    command = [sys.executable, str(code), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-2:][0] == "complete"


def test_a_model_in_memory_is_refused_with_the_reason(demo_model: Any, store: Store) -> None:
    for model in (demo_model, demo_model.module):
        with pytest.raises(InputError, match="must be given by name") as refused:
            record_with_workers(model, ["A text."], store, name="base", workers=2)
        assert "memory of this process" in str(refused.value)


def test_everything_that_can_be_wrong_is_found_before_ray_starts(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def start(*_: Any, **__: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(module, "ray_running", start)
    store.begin_run(name="taken")
    texts = ["A text."]
    for options, words in (
        ({"name": "taken"}, "already has a run called 'taken'"),
        ({"name": " "}, "name of Unicode text"),
        ({"workers": 0}, "workers is a number from 1 up"),
        ({"threads": 0}, "threads is a number from 1 up"),
        ({"batches_a_task": 0}, "batches_a_task is a number from 1 up"),
        ({"batch_size": 0}, "batch_size"),
        ({"probes": ["nonsense"]}, "nonsense"),
    ):
        with pytest.raises(InputError, match=words):
            record_with_workers("demo", texts, store, **{"name": "base", "workers": 2, **options})
    with pytest.raises(InputError, match="there is no corpus at"):
        record_with_workers("demo", tmp_path / "none.jsonl", store, name="base", workers=2)


def test_without_ray_the_extra_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"moescope\[ray\]"):
        record_with_workers("demo", ["A text."], store, name="base", workers=2)


class Resources:
    """What a Ray says it has."""

    def __init__(self, **has: float) -> None:
        self.has = has

    def cluster_resources(self) -> dict[str, float]:
        return dict(self.has)


@pytest.mark.parametrize(
    ("has", "workers", "options", "share"),
    [
        ({"CPU": 8.0}, 2, {}, Share(4, 0)),
        ({"CPU": 8.0}, 3, {}, Share(2, 0)),
        ({"CPU": 8.0}, 2, {"threads": 1}, Share(1, 0)),
        ({"CPU": 64.0, "GPU": 4.0}, 4, {}, Share(16, 1)),
        ({"CPU": 64.0, "GPU": 4.0}, 4, {"device": "cuda"}, Share(16, 1)),
        ({"CPU": 64.0, "GPU": 4.0}, 8, {"device": "cpu"}, Share(8, 0)),
        ({"CPU": 64.0, "GPU": 8.0}, 2, {"spread": True}, Share(32, 4)),
    ],
)
def test_cpus_and_gpus_are_divided(has: dict[str, float], workers: int, options: dict[str, Any], share: Share) -> None:
    assert (
        share_of(Resources(**has), workers, **{"threads": None, "device": "auto", "spread": False, **options}) == share
    )


@pytest.mark.parametrize(
    ("has", "workers", "options", "words"),
    [
        ({"CPU": 2.0}, 3, {}, "3 CPUs"),
        ({"CPU": 8.0}, 2, {"threads": 5}, "10 CPUs"),
        ({"CPU": 64.0, "GPU": 4.0}, 5, {}, "5 GPUs"),
        ({"CPU": 64.0}, 1, {"device": "cuda"}, "0 GPUs"),
        ({"CPU": 64.0, "GPU": 4.0}, 2, {"device": "cuda:1"}, "a device of its own"),
    ],
)
def test_more_workers_than_there_is_room_for_are_refused(
    has: dict[str, float], workers: int, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        share_of(Resources(**has), workers, **{"threads": None, "device": "auto", "spread": False, **options})


def test_a_name_means_the_same_in_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a folder that holds one called `demo`, as `make demo` leaves it."""
    from moescope.probes.workers.record_with_workers import _wherever

    monkeypatch.chdir(tmp_path)
    for name in ("demo", "weights"):
        (tmp_path / name).mkdir()
    assert _wherever("demo") == "demo"
    assert _wherever("weights") == str(tmp_path / "weights")
    assert _wherever("allenai/OLMoE-1B-7B-0924") == "allenai/OLMoE-1B-7B-0924"
