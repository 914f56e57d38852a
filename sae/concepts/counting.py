"""A bar on stderr for work that is counted: probes, descriptions, judgements."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

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
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task(label, total=max(total, 1))

        counted = 0

        def count(done: int = 1, /) -> None:
            nonlocal counted
            counted += done
            bar.advance(task, done)
            tell(label, counted, max(total, 1))

        yield count
