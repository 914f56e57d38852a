"""Who watches long work: progress that is drawn on stderr can be heard by a program too, which may stop the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[str, float, float, str], None]
"""Called with what is done, how much of it, out of how much, and how fast or with what; may raise KeyboardInterrupt."""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def watched(listener: Listener) -> Iterator[None]:
    """Hear of every step of the long work done inside, on this thread.

    Work ends in order where the listener raises KeyboardInterrupt, as it does after Ctrl-C: what was committed stays, and
    what can be resumed can be.

    Example:
        >>> with watched(lambda what, done, total, words: print(what, done, "of", total)):
        ...     tell("recording", 3, 10)
        recording 3 of 10
    """
    before = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(before)


def tell(what: str, done: float, total: float, words: str = "") -> None:
    """Tell who watches how far the work is; nobody may."""
    if (listener := _listener.get()) is not None:
        listener(what, done, total, words)
