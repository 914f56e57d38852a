"""The loop: every batch is read once, and every autoencoder makes a step on it."""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from moescope.core.errors import RunError
from moescope.sae.training.batches import Batches
from moescope.sae.training.checkpoints import Checkpoints
from moescope.sae.training.progress import TrainingProgress
from moescope.sae.training.trainee import Trainee

_CURVE_POINTS = 100
_LOOK_ON_DEVICES = 32


@dataclass(frozen=True)
class Diverged:
    """A training that was stopped because something was not finite.

    Attributes:
        name: of the autoencoder in which it was seen; None where a batch could not be read.
        step: 1-based.
        what: was not finite, or what is wrong with the batch.
    """

    name: str | None
    step: int
    what: str

    def __str__(self) -> str:
        if self.name is None:
            return f"at step {self.step} a batch could not be read: {self.what}"
        return f"at step {self.step} of {self.name!r} {self.what} is not finite"


@dataclass(frozen=True)
class Ended:
    """How a training ended.

    Attributes:
        step: steps that were done.
        seconds: that they took, those before a resume included.
        diverged: set where it was stopped for numbers that are not finite.
        interrupted: whether it was stopped by Ctrl-C.
        saved: step of the checkpoint that is kept; None where there is none.
    """

    step: int
    seconds: float
    diverged: Diverged | None = None
    interrupted: bool = False
    saved: int | None = None


def fit(
    trainees: Sequence[Trainee],
    batches: Batches,
    *,
    steps: int,
    checkpoints: Checkpoints,
    every: int | None,
    first: int = 0,
    seconds: float = 0.0,
    progress: bool = True,
) -> Ended:
    """Train until `steps` steps are done, Ctrl-C, or a number that is not finite.

    Args:
        trainees: begun or restored.
        batches: at the place that belongs to `first`.
        steps: in all.
        checkpoints: where states are kept.
        every: steps between two of them; None keeps one only when it is stopped by Ctrl-C.
        first: steps that were done before.
        seconds: that they took.
        progress: show how it goes, on stderr.
    """
    began = time.monotonic() - seconds
    on_cpu = all(trainee.module.device.type == "cpu" for trainee in trainees)
    look, note = (1 if on_cpu else _LOOK_ON_DEVICES), max(1, steps // _CURVE_POINTS)
    saved = first if first else None
    batch_size = trainees[0].trainer.cfg.train_batch_size_samples
    with (
        _quiet(),
        _stopped_at_a_step() as stopped,
        TrainingProgress(trainees, steps, batch_size, first, shown=progress) as bar,
    ):
        for step in range(first + 1, steps + 1):
            try:
                batch = next(batches)
            except RunError as failed:  # a vector that is not finite, or a file that went away
                return Ended(step, time.monotonic() - began, Diverged(None, step, failed.problem), saved=saved)
            outputs = [trainee.step(batch) for trainee in trainees]
            keep = every is not None and step % every == 0 and step < steps
            asked = stopped.is_set() and step < steps
            if step % look == 0 or keep or asked or step == steps:
                for trainee, output in zip(trainees, outputs, strict=True):
                    if what := trainee.wrong(output):
                        return Ended(step, time.monotonic() - began, Diverged(trainee.name, step, what), saved=saved)
            if step % note == 0 or step == steps:
                for trainee, output in zip(trainees, outputs, strict=True):
                    trainee.curve.append(trainee.measure(output))
            try:
                bar.at(step, outputs)
            except KeyboardInterrupt:  # of who watches; after the next step a checkpoint is written
                stopped.set()
            if keep or asked:
                checkpoints.write(step, trainees, batches.state(), time.monotonic() - began)
                saved = step
            if asked:
                return Ended(step, time.monotonic() - began, interrupted=True, saved=saved)
    return Ended(steps, time.monotonic() - began, saved=saved)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch says once that its sparse matrices are new."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        yield


@contextmanager
def _stopped_at_a_step() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, so that training stops between two steps; a second Ctrl-C stops it where it is."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread is told of Ctrl-C
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set() and callable(before):
            before(number, frame)
        asked.set()

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
