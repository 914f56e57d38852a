"""What a long command is at, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stages(doing: str) -> Iterator[Callable[[str], None]]:
    """Give a function that shows what is being done; on a terminal a line that goes away at the end, elsewhere nothing.

    Args:
        doing: the work as a whole: `importing`.
    """
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status(f"{escape(doing)} …") as status:
        yield lambda stage: status.update(f"{escape(doing)}: {escape(stage)} …")
