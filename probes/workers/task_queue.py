"""The batches of a plan as tasks, handed out in order, given out again where a worker died."""

from __future__ import annotations

from collections import deque

from moescope.core.errors import RunError
from moescope.probes.workers.job import Task


class TaskQueue:
    """Tasks of a plan whose length shows only when somebody comes to its end.

    Args:
        size: batches a task.
        attempts: how often a task may be tried before its death is taken to be its own fault.
    """

    def __init__(self, size: int, attempts: int) -> None:
        self._size, self._attempts = size, attempts
        self._next = 0
        self._again: deque[Task] = deque()
        self.plan_batches: int | None = None

    def take(self) -> Task | None:
        """The next task: one that was given back, else further on in the plan; None where there is none now."""
        if self._again:
            return self._again.popleft()
        if self.plan_batches is not None and self._next >= self.plan_batches:
            return None
        task = Task(self._next, self._next + self._size)
        self._next = task.end
        return task

    def give_back(self, task: Task, reason: str) -> None:
        """A worker died over a task: try it again.

        Raises:
            RunError: it was tried often enough.
        """
        if task.attempt + 1 >= self._attempts:
            raise RunError(
                f"workers died {self._attempts} times while they recorded batches {task.first} to {task.end - 1}",
                found=reason,
                fix="lower batch_size or max_length, or use fewer workers: it is usually memory that runs out",
            )
        self._again.append(Task(task.first, task.end, task.attempt + 1))
