"""Progress of a training on stderr: loss, active latents, dead share, explained variance, vectors a second, time left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.progress import TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from moescope.core.bar import bar
from moescope.core.progress import tell
from moescope.sae.training.trainee import Trainee

_SECONDS = 1.0


class TrainingProgress:
    """A bar over the steps and, for each autoencoder, a line of how it is doing on the last batch.

    Args:
        trainees: what is trained.
        steps: in all.
        batch_size: vectors a step.
        first: steps that were done before.
        shown: draw it; otherwise nothing is written.
    """

    def __init__(self, trainees: Sequence[Trainee], steps: int, batch_size: int, first: int, *, shown: bool) -> None:
        columns = (
            TextColumn("{task.description}"),
            TaskProgressColumn(),
            TextColumn("{task.fields[told]}", table_column=Column(no_wrap=False)),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._bar = bar(columns, shown=shown)
        self._trainees, self._size, self._steps, self._shown = trainees, batch_size, steps, shown
        self._tasks = [self._bar.add_task(t.name, total=steps, completed=first, told="") for t in trainees]
        self._began, self._first, self._told = time.monotonic(), first, 0.0

    def at(self, step: int, outputs: Sequence[Any]) -> None:
        """Say how far it is, at most once a second."""
        now = time.monotonic()
        if now - self._told < _SECONDS:
            return
        self._told = now
        speed = (step - self._first) * self._size / max(now - self._began, 1e-9)
        tell("training", step, self._steps, f"{speed:,.0f} vectors/s")
        if not self._shown:
            return
        for task, trainee, output in zip(self._tasks, self._trainees, outputs, strict=True):
            m = trainee.measure(output)
            told = (
                f"loss {m['loss']:.3g}, L0 {m['l0']:.1f}, dead {100 * m['dead_share']:.1f} %, "
                f"explained {100 * m['explained_variance']:.1f} %, {speed:,.0f} vectors/s"
            )
            self._bar.update(task, completed=step, told=told)

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            for task in self._tasks:
                self._bar.update(task, refresh=True)
        self._bar.stop()
