"""One recording a model at a time: hooks of two would see each other's passes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from moescope.core.errors import InputError

_LOCK = threading.Lock()
_HELD: dict[int, str] = {}


@contextmanager
def claimed(module: nn.Module, run: str) -> Iterator[None]:
    """Hold a model for the run of that name while the context lasts.

    Raises:
        InputError: another recording of the same model is under way, in this thread or another.
    """
    with _LOCK:
        if id(module) in _HELD:
            raise InputError(
                "this model is already being recorded",
                found=f"run {_HELD[id(module)]!r} is under way",
                fix="let it end before another begins, or load the model a second time",
            )
        _HELD[id(module)] = run
    try:
        yield
    finally:
        with _LOCK:
            del _HELD[id(module)]
