"""A request of the live model: its place in the line, its end, and what a page says of the model meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from moescope.core.errors import InputError, MoescopeError, RunError
from moescope.dashboard.failures import without_frames

State = Literal["none", "unloaded", "loading", "ready", "busy", "failed"]


class Stopped(RunError):  # noqa: N818  stopping is no error; a RunError, so that whatever is under way cleans up after itself
    """The user stopped what the model was doing."""


class Replaced(InputError):  # noqa: N818  nothing went wrong: its asker wants something newer
    """A newer request of the same asker took this one's place before it began."""


@dataclass(frozen=True)
class Status:
    """What a page says of the model.

    Attributes:
        state: `none` (no model chosen), `unloaded`, `loading`, `ready`, `busy` or `failed`.
        source: what is chosen, as `moescope.load` takes it.
        words: what it is busy with.
        seconds: how long it has been in this state.
        waiting: requests in the line.
        name: of the loaded model, described in a line; None where none is loaded.
        memory: bytes of its weights.
        device: where its inputs go.
        problem: why it could not be loaded.
    """

    state: State
    source: str | None
    words: str
    seconds: float
    waiting: int
    name: str | None
    memory: int
    device: str
    problem: MoescopeError | None


@dataclass(eq=False)
class Ticket:
    """One request: its place in the line, and later its answer."""

    request: Callable[[Any], Any]
    who: str
    words: str
    source: str
    chosen: bool = True
    keeps: bool = False
    over: threading.Event = field(default_factory=threading.Event)
    stop: threading.Event = field(default_factory=threading.Event)
    stopped_at: float = 0.0
    gives_way: bool = False
    answer: Any = None
    failure: BaseException | None = None

    def end(self, answer: Any = None, failure: BaseException | None = None) -> None:
        """Give the asker an answer or a failure; the first counts."""
        if not self.over.is_set():
            if self.gives_way and isinstance(failure, Stopped):
                failure = Replaced("a newer request took the place of this one")
            if failure is not None:
                without_frames(failure)
            self.answer, self.failure = answer, failure
            self.over.set()
