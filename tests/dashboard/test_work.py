from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from pathlib import Path

import pytest

import moescope as ms
from moescope.core.errors import InputError
from moescope.core.progress import tell, watched
from moescope.dashboard.work import Job, Work


def _ended(job: Job, seconds: float = 60) -> Job:
    end = time.monotonic() + seconds
    while not job.over:
        assert time.monotonic() < end, job
        time.sleep(0.01)
    return job


def test_jobs_are_done_one_after_the_other_in_order() -> None:
    work, order, running = Work(), [], threading.Semaphore(1)

    def task(job: Job) -> str:
        assert running.acquire(blocking=False), "two at a time"
        time.sleep(0.02)
        order.append(job.number)
        running.release()
        return f"/?job={job.number}"

    jobs = [work.start(f"job {i}", task) for i in range(4)]
    assert [_ended(job).state for job in jobs] == ["done"] * 4
    assert order == [1, 2, 3, 4]
    assert [job.link for job in work.jobs()] == ["/?job=4", "/?job=3", "/?job=2", "/?job=1"], "newest first"


def test_what_the_work_tells_is_the_jobs_progress() -> None:
    heard = threading.Event()

    def task(job: Job) -> None:
        with job.watch():
            tell("recording", 30, 120, "9 tokens/s")
        heard.set()

    job = _ended(Work().start("a profile", task))
    assert (job.done, job.total, job.words) == (30, 120, "recording · 9 tokens/s")


def test_a_failure_is_kept_with_its_reason_and_the_next_job_has_its_turn() -> None:
    work = Work()

    def fail(_: Job) -> None:
        raise InputError("no such model", fix="choose another")

    def crash(_: Job) -> None:
        raise ZeroDivisionError("a bug")

    failed, crashed, fine = work.start("a", fail), work.start("b", crash), work.start("c", lambda _: "/")
    assert _ended(fine).state == "done"
    assert (failed.state, str(failed.problem)) == ("failed", "no such model. What to do: choose another.")
    assert crashed.state == "failed"
    assert isinstance(crashed.problem, ZeroDivisionError)


def test_a_waiting_job_that_is_cancelled_never_begins() -> None:
    work, go, begun = Work(), threading.Event(), []
    first = work.start("first", lambda _: str(go.wait(10)))
    second = work.start("second", lambda job: begun.append(job.number))
    work.cancel(second.number)
    go.set()
    assert _ended(first).state == "done"
    third = _ended(work.start("third", lambda _: None))
    assert (second.state, third.state, begun) == ("cancelled", "done", [])


def test_a_recording_that_is_cancelled_keeps_what_it_committed_and_can_be_resumed(tmp_path: Path) -> None:
    texts = ["The cat sat on the mat and looked at the dog. " * 4] * 12
    model = ms.load("demo")
    with ms.Store(tmp_path / "runs.duckdb") as store:
        work = Work()

        def task(job: Job) -> None:
            def heard(_what: str, done: float, total: float, _words: str) -> None:
                if done >= total / 2:
                    work.cancel(job.number)
                job.tell(done, total)

            with watched(heard):
                ms.record(model, texts, store, name="long", batch_size=1, progress=False)

        job = _ended(work.start("long", task))
        assert (job.state, store.run("long").status) == ("cancelled", "incomplete")
        whole = ms.record(model, texts, store, name="long", batch_size=1, resume=True, progress=False)
        assert whole.complete
        other = ms.record(model, texts, store, name="unbroken", batch_size=1, progress=False)
        count = "SELECT count(*), sum(nll) FROM tokens WHERE run_id = ?"
        assert store.fetch(count, [whole.run_id]) == store.fetch(count, [other.run_id])


def test_a_job_is_told_of_after_it_ended() -> None:
    told: list[str] = []
    work = Work(after=lambda job: told.append(job.state))
    _ended(work.start("a", lambda _: None))
    end = time.monotonic() + 5
    while not told and time.monotonic() < end:
        time.sleep(0.01)
    assert told == ["done"]


@pytest.mark.parametrize("number", [0, 1, 99])
def test_cancelling_what_is_over_or_unknown_changes_nothing(number: int) -> None:
    work = Work()
    job = _ended(work.start("a", lambda _: None))
    work.cancel(number)
    assert job.state == "done"


def test_what_fails_after_a_job_leaves_the_worker_alive() -> None:
    def after(_: Job) -> None:
        raise ZeroDivisionError("a bug")

    work = Work(after=after)
    first, second = work.start("a", lambda _: "/"), work.start("b", lambda _: "/")
    assert [_ended(first, 10).state, _ended(second, 10).state] == ["done", "done"]


def test_a_task_that_leaves_by_an_exit_fails_and_the_next_job_has_its_turn() -> None:
    def leave(_: Job) -> None:
        raise SystemExit(3)

    work = Work()
    left, fine = work.start("a", leave), work.start("b", lambda _: "/")
    assert [_ended(left, 10).state, _ended(fine, 10).state] == ["failed", "done"]
    assert "SystemExit(3)" in str(left.problem)


@pytest.mark.parametrize("kind", [InputError, RuntimeError])
def test_a_failure_that_is_kept_keeps_nothing_that_its_functions_held(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("moescope.dashboard"), "disabled", True)  # pytest keeps what is logged

    class Model:
        pass

    models: list[weakref.ref[Model]] = []

    def fail(_: Job) -> None:
        model = Model()
        models.append(weakref.ref(model))
        try:
            raise ValueError("inside")
        except ValueError as inside:
            raise kind("outside") from inside

    job = _ended(Work().start("a", fail))
    assert isinstance(job.problem, kind)
    until = time.monotonic() + 5
    while models[0]() is not None and time.monotonic() < until:
        gc.collect()
    assert models[0]() is None
