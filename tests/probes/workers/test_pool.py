"""The pool against a Ray of paper: who gets which task, and what happens when workers die or refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from moescope.core.errors import InputError, RunError, StoreError
from moescope.probes.corpus import Corpus
from moescope.probes.workers.job import Job, Outcome, Refusal, Task
from moescope.probes.workers.pool import WorkerPool
from moescope.probes.workers.ray_cluster import Share
from moescope.probes.workers.task_queue import TaskQueue


class Died(Exception):
    """A worker's death."""


@dataclass
class PaperRay:
    """As much of Ray as the pool uses, in one thread. `behave(worker, task)` answers for a task, or None to get ready."""

    behave: Callable[[int, Task | None], Outcome]
    started: int = 0
    killed: list[int] = field(default_factory=list)
    waiting: list[tuple[int, int, Task | None]] = field(default_factory=list)
    order: Callable[[list[Any]], Any] = lambda references: references[0]

    class exceptions:
        RayActorError = Died

    def remote(self, kind: type) -> Any:
        return self

    def options(self, **_: Any) -> Any:
        return Maker(self)

    def wait(self, references: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return [type(self).order(references)], []

    def get(self, reference: tuple[int, Task | None, int]) -> Outcome:
        return self.behave(reference[0], reference[1])

    def kill(self, worker: Any, **_: Any) -> None:
        self.killed.append(worker.number)


@dataclass
class Maker:
    ray: PaperRay

    def remote(self, job: Job) -> Any:
        self.ray.started += 1
        return Worker(self.ray, self.ray.started)


class Method:
    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def remote(self, task: Task | None = None) -> Any:
        self.worker.calls += 1
        return (self.worker.number, task, self.worker.calls)


class Worker:
    def __init__(self, ray: PaperRay, number: int) -> None:
        self.ray, self.number, self.calls = ray, number, 0
        self.prepare = self.record = Method(self)


def recorded(task: Task, plan: int) -> Outcome:
    """What a worker that lives says of a plan of so many batches."""
    batches = max(min(task.end, plan) - task.first, 0)
    return Outcome(None, task.file if batches else None, batches, plan_batches=plan if task.end >= plan else None)


def pool_of(behave: Callable[[int, Task | None], Outcome], workers: int = 2) -> tuple[WorkerPool, PaperRay]:
    ray = PaperRay(behave)
    job = Job("demo", {}, Corpus.load([]), "", "base", {}, "", "", "", 1)
    return WorkerPool(ray, job, workers, Share(1, 0)), ray


def work(
    behave: Callable[[int, Task | None], Outcome], *, size: int = 2, workers: int = 2
) -> tuple[list[Task], PaperRay]:
    pool, ray = pool_of(behave, workers)
    done: list[tuple[Task, Outcome]] = []
    try:
        pool.run(TaskQueue(size, 3), lambda task, outcome: done.append((task, outcome)))
    finally:
        assert len(set(ray.killed)) + ray_deaths(ray) >= ray.started, "a worker was left behind"
    return [task for task, outcome in done if outcome.shard], ray


def ray_deaths(ray: PaperRay) -> int:
    return getattr(ray.behave, "deaths", 0)


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("plan", [1, 7, 8])
def test_every_batch_is_recorded_once(plan: int, workers: int) -> None:
    tasks, _ = work(lambda _, task: Outcome() if task is None else recorded(task, plan), workers=workers)
    covered = sorted(n for task in tasks for n in range(task.first, min(task.end, plan)))
    assert covered == list(range(plan))


class Mortal:
    """Workers that die over some tasks, as often as said."""

    def __init__(self, plan: int, deaths: dict[int, int], *, getting_ready: int = 0) -> None:
        self.plan, self.left, self.getting_ready, self.deaths = plan, dict(deaths), getting_ready, 0

    def __call__(self, worker: int, task: Task | None) -> Outcome:
        if task is None:
            if self.getting_ready > 0:
                self.getting_ready -= 1
                self._die()
            return Outcome()
        if self.left.get(task.first, 0):
            self.left[task.first] -= 1
            self._die()
        return recorded(task, self.plan)

    def _die(self) -> None:
        self.deaths += 1
        raise Died("the process is gone")


@pytest.mark.parametrize("deaths", [{0: 1}, {6: 2}, {0: 2, 2: 1, 4: 2, 6: 1}])
def test_a_task_whose_worker_died_is_given_to_another(deaths: dict[int, int]) -> None:
    behave = Mortal(8, deaths)
    tasks, ray = work(behave)
    assert sorted(task.first for task in tasks) == [0, 2, 4, 6]
    assert {task.first: task.attempt for task in tasks if task.attempt} == deaths
    assert ray.started == 2 + sum(deaths.values())
    assert len({task.file for task in tasks}) == 4


def test_a_task_that_workers_die_of_ends_the_run() -> None:
    with pytest.raises(RunError, match="died 3 times while they recorded batches 4 to 5") as raised:
        work(Mortal(8, {4: 3}))
    assert "memory" in str(raised.value)


def test_workers_that_cannot_get_ready_end_the_run() -> None:
    with pytest.raises(RunError, match="3 workers in a row died while they loaded the model"):
        work(Mortal(8, {}, getting_ready=99))
    tasks, _ = work(Mortal(8, {}, getting_ready=2))
    assert len(tasks) == 4


def test_the_last_task_comes_back_though_the_others_are_gone() -> None:
    """Everybody else has gone home when a worker dies over the last task."""
    behave = Mortal(4, {0: 1})
    PaperRay.order = staticmethod(lambda references: references[-1])  # type: ignore[assignment]  # the first task ends last
    try:
        tasks, _ = work(behave)
    finally:
        PaperRay.order = staticmethod(lambda references: references[0])  # type: ignore[assignment]
    assert sorted(task.first for task in tasks) == [0, 2]


@pytest.mark.parametrize("error", [InputError, RunError, StoreError])
def test_a_refusal_of_a_worker_is_raised_here_as_it_was(error: type[Exception]) -> None:
    refused = error("no such site", expected="a site", found="another", fix="leave it out")  # type: ignore[call-arg]

    def behave(_: int, task: Task | None) -> Outcome:
        return Outcome(Refusal.of(refused)) if task is None else recorded(task, 4)

    with pytest.raises(error) as raised:
        work(behave)
    assert type(raised.value) is error
    assert str(raised.value) == str(refused)
    assert raised.value.fix == "leave it out"  # type: ignore[attr-defined]


def test_a_mistake_in_a_worker_is_told_with_its_kind() -> None:
    error = Refusal.of(ZeroDivisionError("division by zero")).error()
    assert isinstance(error, RunError)
    assert "ZeroDivisionError: division by zero" in str(error)
