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
    from rich.text import Text

    # Text, because a plain str may hold rich's markup or the code of an emoji
    with Console(stderr=True).status(Text(f"{doing} …")) as status:
        yield lambda stage: status.update(Text(f"{doing}: {stage} …"))
