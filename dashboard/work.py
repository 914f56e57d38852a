"""Long work started from a page: one thing at a time on a thread of its own, with progress and cancel.

It goes on when the tab is closed. It stays in this process, since no other could open the store meanwhile.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal

from moescope.core.errors import MoescopeError
from moescope.core.progress import watched
from moescope.dashboard.failures import without_frames
from moescope.dashboard.sql.memory_bound import lifted

_LOG = logging.getLogger("moescope.dashboard")
State = Literal["waiting", "running", "done", "failed", "cancelled"]


class Cancelled(KeyboardInterrupt):
    """The user cancelled the work; long work ends in order on it, as after Ctrl-C."""


@dataclass
class Job:
    """One piece of work.

    Attributes:
        number: 1, 2, … in the order of starting.
        title: what it does, for instance "profile of demo".
        state: where it stands.
        done, total: how far it is; total None where that is not known.
        words: the step it is at.
        link: where its result is shown.
        problem: why it failed.
        begun, ended: seconds since the epoch.
    """

    number: int
    title: str
    state: State = "waiting"
    done: float = 0
    total: float | None = None
    words: str = ""
    link: str | None = None
    problem: MoescopeError | Exception | None = None
    begun: float | None = None
    ended: float | None = None
    _stop: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def over(self) -> bool:
        """Whether nothing more will happen."""
        return self.state in ("done", "failed", "cancelled")

    @property
    def stopping(self) -> bool:
        """Whether the user cancelled it."""
        return self._stop.is_set()

    def tell(self, done: float, total: float | None = None, *, words: str = "") -> None:
        """Say how far the work is. Raises `Cancelled` where the user asked for it."""
        if self._stop.is_set():
            raise Cancelled
        self.done, self.total, self.words = done, total, words or self.words

    def watch(self) -> AbstractContextManager[None]:
        """Follow the progress that the work done inside tells, and stop it at its next step once it is cancelled."""
        return watched(lambda what, done, total, words: self.tell(done, total, words=f"{what} · {words}".strip(" ·")))


Task = Callable[[Job], str | None]
"""Does the work, telling the job how far it is; gives the link to its result."""


class Work:
    """A queue of jobs and the thread that does them in order.

    Args:
        after: called with each job that ended, on the worker's thread.
    """

    def __init__(self, after: Callable[[Job], None] | None = None) -> None:
        self._jobs: list[Job] = []
        self._queue: queue.SimpleQueue[tuple[Job, Task]] = queue.SimpleQueue()
        self._after = after
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self, title: str, task: Task) -> Job:
        """Put a piece of work into the queue."""
        with self._lock:
            job = Job(len(self._jobs) + 1, title)
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="moescope-work", daemon=True)
                self._thread.start()
        self._queue.put((job, task))
        return job

    def jobs(self) -> list[Job]:
        """All jobs of this session, newest first."""
        with self._lock:
            return self._jobs[::-1]

    def busy(self) -> bool:
        """Whether something runs or waits."""
        return any(not job.over for job in self.jobs())

    def cancel(self, number: int) -> None:
        """Ask a job to end; it does so at its next step. What it has committed stays."""
        for job in self.jobs():
            if job.number == number and not job.over:
                job._stop.set()
                if job.state == "waiting":
                    job.state, job.ended = "cancelled", time.time()

    def _work(self) -> None:
        while True:
            job, task = self._queue.get()
            if not job.over:
                self._do(job, task)

    def _do(self, job: Job, task: Task) -> None:
        job.state, job.begun = "running", time.time()
        try:
            with lifted():
                job.link = task(job)
            job.state = "done"
        except KeyboardInterrupt:
            job.state = "cancelled"
        except MoescopeError as refused:
            without_frames(refused)
            job.problem, job.state = refused, "failed"
        except BaseException as error:  # noqa: BLE001  whatever it was, the page must say so, and the next job have its turn
            _LOG.exception("%s failed", job.title)
            without_frames(error)
            job.problem = error if isinstance(error, Exception) else RuntimeError(f"it ended by {error!r}")
            job.state = "failed"
        job.ended = time.time()
        if self._after is not None:
            try:
                self._after(job)
            except Exception:  # noqa: BLE001  the next job has its turn whatever follows this one
                _LOG.exception("what follows %s failed", job.title)
