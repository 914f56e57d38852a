"""Progress bars: rich's on stderr, and in a notebook one output that is rewritten in place and ends as one line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from moescope.core.kernel import in_notebook
from moescope.core.text import escaped, printable

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

# Seconds between two states in a notebook: the kernel's messages are few, and a reader sees it move.
_EVERY = 0.5


class Bar(Protocol):
    """What long work tells of itself to."""

    def start(self) -> None:
        """Begin to show it."""

    def stop(self) -> None:
        """Show how it ended, and no more."""

    def add_task(self, description: str, *, total: float, completed: int = 0, **fields: Any) -> Any:
        """Another piece of work: what it is, and how much; gives its number."""

    def update(self, task_id: Any, *, completed: float | None = None, refresh: bool = False, **fields: Any) -> None:
        """How much of it is done."""

    def advance(self, task_id: Any, advance: float = 1) -> None:
        """So much more of it is done."""


def bar(columns: Sequence[ProgressColumn], *, shown: bool) -> Bar:
    """A bar with these columns on stderr; in a notebook one of its own.

    Args:
        columns: for a terminal.
        shown: draw it; otherwise nothing is written.
    """
    if shown and in_notebook():
        return NotebookBar()
    from rich.console import Console
    from rich.progress import Progress

    return Progress(*columns, console=Console(stderr=True), disable=not shown)


@contextmanager
def stages(label: str, *, shown: bool) -> Iterator[Callable[[str], None]]:
    """Give a function that says which stage of some work of unknown length is being done.

    Example:
        >>> with stages("planning", shown=False) as tell:
        ...     tell("counting")
    """
    if not shown:
        yield lambda _: None
    elif in_notebook():
        with NotebookBar() as drawn:
            task = drawn.add_task(label, total=1, stage="…")
            yield lambda stage: drawn.update(task, stage=f"{stage} …")
            drawn.update(task, completed=1, stage="")
    else:
        from rich.console import Console

        with Console(stderr=True).status(f"{label} …") as status:
            yield lambda stage: status.update(f"{label}: {stage} …")


@dataclass
class _Task:
    """A piece of work, how much of it is done, and words on it."""

    description: str
    total: float
    completed: float
    began: float
    fields: dict[str, Any] = field(default_factory=dict)

    def text(self, *, ended: float | None = None) -> str:
        """In one line."""
        now = time.monotonic() if ended is None else ended
        share = min(1.0, self.completed / self.total) if self.total else 1.0
        seconds = now - self.began
        parts = [f"{share:.0%}", *(str(words) for words in self.fields.values() if words)]
        if ended is None and 0 < share < 1:
            parts.append(f"{_clock(seconds)}, {_clock(seconds / share - seconds)} left")
        else:
            parts.append(_clock(seconds))
        return f"{self.description}: {' · '.join(parts)}"


class NotebookBar:
    """Progress in a notebook, without widgets and without script: an HTML bar and a line for each piece of work.

    It is one output, rewritten in place at most twice a second. What a saved notebook keeps is its last state: a line of text
    for each piece of work.
    """

    def __init__(self) -> None:
        self._tasks: list[_Task] = []
        self._handle: Any = None
        self._drawn = 0.0
        self._running = False

    def start(self) -> None:
        """Begin to show it."""
        self._running = True
        self._draw(now=True)

    def stop(self) -> None:
        """Leave one line for each piece of work; stopping twice is fine."""
        if self._running:
            self._running = False
            self._draw(now=True)

    def add_task(self, description: str, *, total: float, completed: float = 0, **fields: Any) -> int:
        """Another piece of work: what it is, and how much; gives its number."""
        self._tasks.append(_Task(description, total, completed, time.monotonic(), fields))
        return len(self._tasks) - 1

    def update(self, task_id: int, *, completed: float | None = None, refresh: bool = False, **fields: Any) -> None:
        """How much of it is done."""
        task = self._tasks[task_id]
        task.completed = task.completed if completed is None else completed
        task.fields |= fields
        self._draw(now=refresh)

    def advance(self, task_id: int, advance: float = 1) -> None:
        """So much more of it is done."""
        self.update(task_id, completed=self._tasks[task_id].completed + advance)

    def __enter__(self) -> NotebookBar:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _draw(self, *, now: bool) -> None:
        moment = time.monotonic()
        if not self._tasks or (self._handle is None and not self._running):
            return
        if not now and (not self._running or moment - self._drawn < _EVERY):
            return
        self._drawn = moment
        data = self._data()
        if self._handle is None:
            from IPython.display import DisplayHandle

            self._handle = DisplayHandle()  # type: ignore[no-untyped-call]  # IPython has no types
            self._handle.display(data, raw=True)
        else:
            self._handle.update(data, raw=True)

    def _data(self) -> dict[str, str]:
        lines = [task.text(ended=None if self._running else time.monotonic()) for task in self._tasks]
        text = printable("\n".join(lines))
        if not self._running:
            return {"text/plain": text}
        rows = "".join(
            f'<div><progress value="{min(task.completed, task.total):g}" max="{max(task.total, 1e-9):g}"></progress> '
            f"{escaped(line)}</div>"
            for task, line in zip(self._tasks, lines, strict=True)
        )
        return {"text/html": rows, "text/plain": text}


def _clock(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    return f"{whole // 60}:{whole % 60:02} min" if whole < 3600 else f"{whole // 3600}:{whole // 60 % 60:02} h"
