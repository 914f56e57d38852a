"""A bar on stderr for work that is counted: probes, descriptions, judgements."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from moescope.core.bar import bar
from moescope.core.progress import tell


class Count(Protocol):
    """Says that so many more are done."""

    def __call__(self, done: int = 1, /) -> None:
        """Move the bar on."""


@contextmanager
def counted(label: str, total: int, *, shown: bool) -> Iterator[Count]:
    """A bar that the function it gives moves on; nothing is written where it is not shown.

    Example:
        >>> with counted("probes", 2, shown=False) as count:
        ...     count()
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    drawn = bar(columns, shown=shown)
    task = drawn.add_task(label, total=max(total, 1))
    counted = 0

    def count(done: int = 1, /) -> None:
        nonlocal counted
        counted += done
        drawn.advance(task, done)
        tell(label, counted, max(total, 1))

    drawn.start()
    try:
        yield count
    finally:
        drawn.stop()
