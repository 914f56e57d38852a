"""`record_with_workers`: what `record` does, shared out to workers on Ray, with the same rows in the end."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from moescope.core.errors import InputError, MoescopeError, RunError
from moescope.core.probe import probes as probe_registry
from moescope.core.sites import Site
from moescope.probes.choices import check_sizes
from moescope.probes.corpus import Corpus
from moescope.probes.failures import reason_of
from moescope.probes.progress import RunProgress
from moescope.probes.workers.job import Job, Outcome, Task
from moescope.probes.workers.pool import ATTEMPTS, WorkerPool
from moescope.probes.workers.ray_cluster import import_ray, ray_running, share_of
from moescope.probes.workers.task_queue import TaskQueue
from moescope.store.merging import merge
from moescope.store.run import Run
from moescope.store.store import Store, check_run_name

# Batches a task: enough to be worth a file of their own, few enough that no worker is waited for long.
_MOST_A_TASK, _TASKS_A_WORKER = 16, 4


def record_with_workers(
    model: str | Path,
    corpus: Any,
    store: Store,
    *,
    name: str,
    workers: int,
    ray_address: str | None = None,
    threads: int | None = None,
    shards: Path | None = None,
    batches_a_task: int | None = None,
    load_options: Mapping[str, Any] | None = None,
    probes: Sequence[str] | None = None,
    sites: Sequence[str | Site] = (),
    sample: float = 1.0,
    generate: int = 0,
    batch_size: int = 8,
    max_length: int = 512,
    padding: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Run:
    """Run a corpus through a model with several workers, each with its own copy of the model.

    Whole batches of the plan go to whichever worker is free; each task is recorded into a store of its own, and in the end
    they are merged. The rows are those of `record` on one such worker: the same machine, kernels and *number of threads*, since
    the order of a sum, and so the last bits of logits, depends on how many threads share it. `runs.settings` tells the number.

    Args:
        model: "demo", a Hub id, a folder or a .gguf file: every worker loads it for itself.
        corpus, store, name: as in `record`. On a cluster a corpus in files must lie on every machine under the same path.
        workers: how many.
        ray_address: of a Ray cluster (`auto`, `host:port`, `ray://…`); None to start a Ray on this machine.
        threads: of torch, in each worker; None to divide the CPUs.
        shards: folder for the workers' stores, which all machines see under the same path; None for one beside the store. It is
            deleted once they are merged.
        batches_a_task: whole batches that a worker is given at a time; None for at most 16.
        load_options: for `load`: device, dtype, revision, trust_remote_code, device_map. Where Ray has GPUs, each worker
            gets one.
        probes, sites, sample, generate, batch_size, max_length, padding, seed, progress: as in `record`.

    Returns:
        The merged run.

    Raises:
        InputError: a model that is no name, a name that is taken, Ray is not installed, not enough CPUs or GPUs, whatever
            `record` refuses.
        RunError: workers died again and again over the same batches, or the disk failed. What was recorded is merged
            into an incomplete run.
        KeyboardInterrupt: after Ctrl-C; what was recorded is merged into an incomplete run.

    Example:
        >>> import tempfile
        >>> with Store(Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = record_with_workers("demo", "demo", store, name="base", workers=2)  # doctest: +SKIP
    """
    _check(model, store, name, workers, batches_a_task, threads)
    check_sizes(batch_size, max_length, generate, sample, padding)
    for probe in probes or ():
        _ = probe_registry[probe]
    loaded = Corpus.load(corpus)
    facts = loaded.facts()
    import_ray()
    folder = (shards or _beside(store)) / uuid.uuid4().hex[:12]
    options = {
        "probes": None if probes is None else list(probes),
        "sites": list(sites),
        "sample": sample,
        "generate": generate,
        "batch_size": batch_size,
        "max_length": max_length,
        "padding": padding,
        "seed": seed,
    }
    loading = dict(load_options or {})
    with ray_running(ray_address) as ray:
        share = share_of(
            ray,
            workers,
            threads=threads,
            device=str(loading.get("device", "auto")),
            spread=loading.get("device_map") is not None,
        )
        _make(folder)
        marker = folder / f"{folder.name}.marker"
        marker.touch()
        job = Job(
            model=_wherever(model),
            load_options=loading,
            corpus=loaded,
            fingerprint=facts.fingerprint,
            name=name,
            options=options,
            folder=str(folder.resolve()),
            marker=marker.name,
            cwd=str(Path.cwd()),
            threads=share.threads,
        )
        size = batches_a_task or _task_size(facts.documents, batch_size, workers)
        crew = _Crew(WorkerPool(ray, job, workers, share), TaskQueue(size, ATTEMPTS), facts.characters, name)
        failure = crew.work(progress=progress)
    return _gather(crew, store, name, folder, workers, failure)


class _Crew:
    """The pool at work, and what it has brought home."""

    def __init__(self, pool: WorkerPool, tasks: TaskQueue, characters: int, name: str) -> None:
        self._pool, self._tasks, self._characters, self._name = pool, tasks, characters, name
        self.shards: list[str] = []
        self.tokens = 0
        self.seconds = 0.0

    def work(self, *, progress: bool) -> BaseException | None:
        """Record everything; gives what stopped it, if anything did."""
        started = time.perf_counter()
        characters = 0
        with RunProgress(f"recording {self._name}", self._characters, shown=progress) as bar:

            def done(task: Task, outcome: Outcome) -> None:
                nonlocal characters
                if outcome.shard is not None:
                    self.shards.append(outcome.shard)
                self.tokens += outcome.tokens
                characters += outcome.characters
                bar.advance_to(characters, self.tokens, time.perf_counter() - started)

            try:
                self._pool.run(self._tasks, done)
            except (Exception, KeyboardInterrupt) as failure:  # noqa: BLE001  raised again once what was recorded is safe
                return failure
            finally:
                self.seconds = time.perf_counter() - started
        return None


def _gather(crew: _Crew, store: Store, name: str, folder: Path, workers: int, failure: BaseException | None) -> Run:
    """Merge what was recorded, take the shards away, and raise what stopped the run, if anything did."""
    run: Run | None = None
    if crew.shards:
        facts = {
            "workers": workers,
            "seconds": round(crew.seconds, 3),
            "tokens_per_second": round(crew.tokens / max(crew.seconds, 1e-9), 1),
        }
        try:
            run = merge(store, sorted(crew.shards), name=name, stopped=reason_of(failure), facts=facts)
        except MoescopeError as error:
            raise RunError(
                "what the workers recorded could not be merged",
                found=str(error),
                fix=f"the shards are kept: moescope merge {store.path} {folder}/*.duckdb",
            ) from error
    shutil.rmtree(folder, ignore_errors=True)
    if folder.parent == _beside(store):
        with suppress(OSError):  # another run may have its shards there
            folder.parent.rmdir()
    if isinstance(failure, (MoescopeError, KeyboardInterrupt)):
        raise failure
    if failure is not None:
        text = " ".join(str(failure).split())[:400]
        raise RunError("the workers failed", found=f"{type(failure).__name__}: {text}") from failure
    if run is None:
        raise InputError("no text of the corpus gives a token", fix="check that the tokenizer belongs to the model")
    return run


def _check(model: Any, store: Store, name: str, workers: int, batches_a_task: int | None, threads: int | None) -> None:
    if not isinstance(model, (str, Path)):
        raise InputError(
            "workers load the model for themselves, so it must be given by name",
            expected='"demo", a Hub id, a folder or a .gguf file',
            found=f"a {type(model).__name__} in the memory of this process, which the others do not have",
            fix="save it to a folder (save_pretrained) and pass that, or record it with one worker",
        )
    for what, number in (("workers", workers), ("batches_a_task", batches_a_task), ("threads", threads)):
        if number is not None and number < 1:
            raise InputError(f"{what} is a number from 1 up", found=str(number))
    store.check_writable()
    check_run_name(name)
    for (status,) in store.fetch("SELECT status FROM runs WHERE name = ?", [name]):
        raise InputError(
            f"{store.path} already has a run called {name!r}", found=str(status), fix="choose another name"
        )


def _task_size(documents: int, batch_size: int, workers: int) -> int:
    """Batches a task, from the least number of batches that a plan of so many documents has."""
    return min(max(documents // batch_size // (workers * _TASKS_A_WORKER), 1), _MOST_A_TASK)


def _beside(store: Store) -> Path:
    return store.path.with_suffix(".shards")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as refused:
        raise InputError(
            f"cannot make a folder for shards at {folder}",
            found=str(refused),
            fix="name another (shards=…)",
        ) from refused


def _wherever(model: str | Path) -> str:
    """A model's name as it means the same in any folder. "demo" is the bundled one, also beside a folder of that name."""
    path = Path(model)
    return str(path.resolve()) if str(model) != "demo" and path.exists() else str(model)
