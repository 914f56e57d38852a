"""How far a sweep is, and how long it still takes, on stderr."""

from __future__ import annotations

from types import TracebackType

from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moescope.core.bar import bar
from moescope.core.progress import tell


class SweepProgress:
    """A bar over the pairs of an intervention and a sequence, with the interventions done.

    Args:
        label: what is swept: `experts`.
        variants, sequences: how many.
        done: variants that were stored before.
        shown: draw it; otherwise nothing is written.
    """

    def __init__(self, label: str, variants: int, sequences: int, *, done: int = 0, shown: bool) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._bar = bar(columns, shown=shown)
        self._label, self._variants, self._sequences = label, variants, max(sequences, 1)
        self._pairs = done * self._sequences
        self._task = self._bar.add_task(label, total=max(variants * self._sequences, 1), state="")
        self.tick(0)

    def tick(self, pairs: int) -> None:
        """Say that so many pairs more are done."""
        self._pairs += pairs
        done = self._pairs // self._sequences
        state = f"{done:,} of {self._variants:,} {self._label}"
        self._bar.update(self._task, completed=self._pairs, state=state)
        tell(self._label, self._pairs, self._variants * self._sequences, state)

    def __enter__(self) -> SweepProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()
