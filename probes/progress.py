"""Progress of a run on stderr (or in a notebook): how far, how fast, how long still."""

from __future__ import annotations

from types import TracebackType

from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moescope.core.bar import bar
from moescope.core.progress import tell


class RunProgress:
    """A bar over the characters of a corpus, with tokens a second.

    Args:
        label: what is running.
        total: characters to come.
        shown: draw it; otherwise nothing is written.
    """

    def __init__(self, label: str, total: int, *, shown: bool) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._bar = bar(columns, shown=shown)
        self._label, self._total = label, max(total, 1)
        self._task = self._bar.add_task(label, total=self._total, speed="")

    def advance_to(self, characters: int, tokens: int, seconds: float) -> None:
        """Say how many characters and tokens are done after so many seconds."""
        speed = f"{tokens:,} tokens, {tokens / seconds:,.0f}/s" if seconds > 0 else ""
        self._bar.update(self._task, completed=characters, speed=speed)
        tell(self._label, characters, self._total, speed)

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()
