"""The workers on Ray: each is given a task as soon as it is free; one that dies is replaced and its task tried again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from moescope.core.errors import RunError
from moescope.probes.workers.actor import ShardWorker
from moescope.probes.workers.job import Job, Outcome, Task
from moescope.probes.workers.ray_cluster import Share
from moescope.probes.workers.task_queue import TaskQueue

ATTEMPTS = 3
_PATIENCE = 0.5  # seconds between looks at the user's Ctrl-C


@dataclass
class _Busy:
    """What a worker is at; without a task it is getting ready."""

    worker: Any
    task: Task | None


class WorkerPool:
    """So many workers, kept busy until the plan is done.

    Args:
        ray: running.
        job: what all workers are told.
        workers: how many.
        share: what each gets of CPUs and GPUs.
    """

    def __init__(self, ray: Any, job: Job, workers: int, share: Share) -> None:
        self._ray, self._job, self._workers, self._share = ray, job, workers, share
        self._busy: dict[Any, _Busy] = {}
        self._deaths = 0
        errors = ray.exceptions
        self._died = tuple(
            getattr(errors, name)
            for name in ("RayActorError", "WorkerCrashedError", "OutOfMemoryError", "NodeDiedError")
            if hasattr(errors, name)
        )

    def run(self, tasks: TaskQueue, done: Callable[[Task, Outcome], None]) -> None:
        """Work through all tasks; `done` is called for each, in the order in which they end.

        Raises:
            MoescopeError: what a worker refused, or a task that workers die of.
        """
        try:
            for _ in range(self._workers):
                self._start()
            while self._busy:
                ready, _ = self._ray.wait(list(self._busy), num_returns=1, timeout=_PATIENCE)
                for reference in ready:
                    self._take(reference, tasks, done)
        finally:
            self._stop()

    def _start(self) -> None:
        options = {"num_cpus": self._share.threads, "num_gpus": self._share.gpus, "max_restarts": 0}
        worker = self._ray.remote(ShardWorker).options(**options).remote(self._job)
        self._busy[worker.prepare.remote()] = _Busy(worker, None)

    def _take(self, reference: Any, tasks: TaskQueue, done: Callable[[Task, Outcome], None]) -> None:
        was = self._busy.pop(reference)
        try:
            outcome: Outcome = self._ray.get(reference)
        except self._died as death:
            self._replace(was, tasks, " ".join(str(death).split())[:400])
            return
        if outcome.refusal is not None:
            self._let_go(was.worker)
            raise outcome.refusal.error()
        if was.task is not None:
            if outcome.plan_batches is not None:
                tasks.plan_batches = outcome.plan_batches
            done(was.task, outcome)
        self._deaths = 0
        self._give(was.worker, tasks)

    def _give(self, worker: Any, tasks: TaskQueue) -> None:
        if (task := tasks.take()) is not None:
            self._busy[worker.record.remote(task)] = _Busy(worker, task)
        else:
            # A task may still come back from a worker that dies: that one's replacement takes it.
            self._let_go(worker)

    def _let_go(self, worker: Any) -> None:
        with suppress(Exception):  # it, or the cluster, may be gone
            self._ray.kill(worker, no_restart=True)

    def _replace(self, was: _Busy, tasks: TaskQueue, reason: str) -> None:
        if was.task is not None:
            tasks.give_back(was.task, reason)
        else:
            self._deaths += 1
            if self._deaths >= ATTEMPTS:
                raise RunError(
                    f"{ATTEMPTS} workers in a row died while they loaded the model",
                    found=reason,
                    fix="use fewer workers: it is usually memory that runs out",
                )
        self._start()

    def _stop(self) -> None:
        for busy in self._busy.values():
            self._let_go(busy.worker)
        self._busy.clear()
