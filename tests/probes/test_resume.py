"""A run that was stopped goes on, and ends with the rows of a run that never was."""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import moescope as ms
from moescope.probes.families.tiny import build_tiny
from moescope.store.vectors import vector_shards, vector_sites

PROBES = ["routing", "experts", "residual", "router_logits", "expert_outputs"]
SITE = "blocks.1.hook_resid_post"


def corpus(sequences: int = 40) -> Any:
    drawn = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 97, (n % 30 + 3,), generator=drawn).tolist() for n in range(sequences)]
    return ms.Corpus.from_token_ids(ids, labels=[str(n % 3) for n in range(sequences)])


@pytest.fixture
def chunks_of_two_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    from moescope.store.writer import RunWriter

    monkeypatch.setitem(RunWriter.__init__.__kwdefaults__, "chunk_rows", 200)


def record(module: Any, store: Any, **options: Any) -> Any:
    settings: dict[str, Any] = {"batch_size": 4, "probes": PROBES, "sites": [SITE], "sample": 0.3}
    return ms.record(ms.load(module), corpus(), store, name="base", progress=False, **(settings | options))


def stopping(module: Any, after: int, with_what: BaseException) -> Callable[[], None]:
    """Let a module's forward fail after so many real batches; gives the undoing. Trial passes have fewer rows or run first."""
    plain, calls = module.forward, []

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise with_what
        return plain(*args, **kwargs)

    module.forward = forward
    return lambda: delattr(module, "forward")


def everything(store: Any, run: Any) -> dict[str, list[str]]:
    """Every row of every table, without what tells two runs apart."""
    from moescope.store.schema import TABLES

    found = {}
    for table in TABLES:
        if table.name in ("store_info", "runs", "activations"):  # how vectors are cut into files depends on the chunks
            continue
        columns = ", ".join(
            f'"{c.name}"' for c in table.columns if c.name not in ("run_id", "path", "checksum", "shard")
        )
        mine = "WHERE run_id = $run" if any(c.name == "run_id" for c in table.columns) else ""
        parameters = {"run": run.run_id} if mine else {}
        found[table.name] = sorted(map(repr, store.fetch(f'SELECT {columns} FROM "{table.name}" {mine}', parameters)))
    for site in vector_sites(run):
        shards = list(vector_shards(run, site, verify=True))
        found[site] = [repr(token) for shard in shards for token in shard.token.tolist()]
        found[f"{site} vectors"] = [repr(row) for shard in shards for row in shard.float32().tolist()]
    return found


@pytest.mark.usefixtures("chunks_of_two_batches")
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("the device went away")])
@pytest.mark.parametrize("generate", [0, 3])
def test_a_stopped_run_goes_on_to_the_rows_of_an_unbroken_one(
    failure: BaseException, generate: int, tmp_path: Path
) -> None:
    module = build_tiny("qwen3_moe")
    with ms.Store(tmp_path / "unbroken.duckdb") as store:
        unbroken = everything(store, record(module, store, generate=generate))
    with ms.Store(tmp_path / "stopped.duckdb") as store:
        undo = stopping(module, 9 * (1 + generate), failure)
        with pytest.raises((KeyboardInterrupt, ms.RunError)):
            record(module, store, generate=generate)
        undo()
        left = store.run("base")
        assert left.status in ("incomplete", "failed")
        batches = store.fetch("SELECT count(*) FROM batches")[0][0]
        assert 0 < batches < 10
        run = record(module, store, generate=generate, resume=True)
        assert run.status == "complete"
        assert run.run_id == left.run_id
        assert run.info["summary"]["resumed_at_batch"] == batches
        assert everything(store, run) == unbroken


@pytest.mark.usefixtures("chunks_of_two_batches")
def test_a_run_that_is_stopped_again_and_again_still_ends_the_same(tmp_path: Path) -> None:
    module = build_tiny("mixtral")
    with ms.Store(tmp_path / "unbroken.duckdb") as store:
        unbroken = everything(store, record(module, store))
    stopped = 0
    for _ in range(20):
        with ms.Store(tmp_path / "stopped.duckdb") as store:
            undo = stopping(module, 7, KeyboardInterrupt())
            with suppress(KeyboardInterrupt):
                record(module, store, resume=True)
            undo()
            if store.run("base").complete:
                break
            stopped += 1
    assert stopped > 1
    with ms.Store(tmp_path / "stopped.duckdb") as store:
        assert everything(store, record(module, store, resume=True)) == unbroken


def test_a_complete_run_is_given_back_and_a_missing_one_begun(tmp_path: Path) -> None:
    module = build_tiny("olmoe")
    with ms.Store(tmp_path / "runs.duckdb") as store:
        first = record(module, store, resume=True)
        before = everything(store, first)
        assert first.info["summary"]["resumed_at_batch"] is None
        again = record(module, store, resume=True)
        assert again.run_id == first.run_id
        assert everything(store, again) == before


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"batch_size": 3}, "batch size"),
        ({"max_length": 16}, "max length"),
        ({"seed": 5}, "seed"),
        ({"probes": ["routing"]}, "probes"),
        ({"sample": 0.5}, "sample"),
    ],
)
def test_another_plan_is_refused_and_nothing_is_touched(changed: dict[str, Any], named: str, tmp_path: Path) -> None:
    module = build_tiny("olmoe")
    with ms.Store(tmp_path / "runs.duckdb") as store:
        undo = stopping(module, 8, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            record(module, store)
        undo()
        run = store.run("base")
        before = everything(store, run)
        with pytest.raises(ms.InputError, match=f"begun with another {named}"):
            record(module, store, resume=True, **changed)
        assert everything(store, run) == before
        assert store.run("base").status == "incomplete"


def test_what_was_wrong_before_the_stop_is_not_forgotten(tmp_path: Path) -> None:
    """A router that goes out of range in the first batches only."""
    module = build_tiny("qwen3_moe")
    experts = next(m for name, m in module.named_modules() if name.endswith("experts"))
    calls: list[int] = []

    def doubled(_module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, ids, weights = given
        calls.append(1)
        return hidden, ids[:, :1].expand_as(ids) if 6 < len(calls) < 9 else ids, weights

    handle = experts.register_forward_pre_hook(doubled)
    with ms.Store(tmp_path / "runs.duckdb") as store:
        undo = stopping(module, 10, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            record(module, store, probes=["routing"], sites=[], sample=1.0)
        undo()
        handle.remove()
        run = record(module, store, probes=["routing"], sites=[], sample=1.0, resume=True)
        assert run.status == "incomplete"
        assert any("same expert twice" in (row["detail"] or "") for row in run.coverage.table.to_pylist())


_CHILD = """
import functools, sys, time
import moescope as ms
import moescope.store.writer as writer
sys.path.insert(0, sys.argv[2])
from test_resume import build_tiny, record
writer.RunWriter.__init__.__kwdefaults__["chunk_rows"] = 200
module = build_tiny("qwen3_moe")
plain = module.forward
@functools.wraps(plain)
def slow(*args, **kwargs):
    time.sleep(0.05)
    return plain(*args, **kwargs)
module.forward = slow
with ms.Store(sys.argv[1]) as store:
    print("begun", flush=True)
    print(record(module, store, resume=True).status)
"""


@pytest.mark.slow
def test_runs_killed_at_twenty_random_moments_reopen_whole_and_end_the_same(tmp_path: Path) -> None:
    """SIGKILL: no handler runs."""
    moments = random.Random(11)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", _CHILD]
    here = str(Path(__file__).parent)
    with ms.Store(tmp_path / "unbroken.duckdb") as store:
        unbroken = everything(store, record(build_tiny("qwen3_moe"), store))
    killed = 0
    while killed < 20:
        path = tmp_path / f"killed-{killed}.duckdb"
        for _ in range(40):
            child = subprocess.Popen([*command, str(path), here], env=environment, stdout=subprocess.PIPE, text=True)
            assert child.stdout is not None
            assert child.stdout.readline() == "begun\n"
            time.sleep(moments.uniform(0.2, 1.2))
            if child.poll() is not None:
                break
            child.send_signal(signal.SIGKILL)
            child.wait()
            killed += 1
            with ms.Store(path) as store:
                for run in store.runs():
                    committed = store.fetch("SELECT coalesce(sum(sequences), 0) FROM batches")[0][0]
                    assert run.rows("sequences") == committed
                    assert run.status in ("incomplete", "complete")  # it may have ended just before it was killed
        with ms.Store(path) as store:
            assert store.run("base").status == "complete"
            assert everything(store, store.run("base")) == unbroken
