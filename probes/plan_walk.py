"""A plan walked piece by piece: each piece goes on from where the last one ended."""

from __future__ import annotations

from collections.abc import Iterator

from moescope.probes.batches import Batch, BatchPlan


class PlanWalk:
    """Gives ranges of a plan's batches. Asked for ranges in rising order, it reads and tokenises the corpus once.

    Attributes:
        length: how many batches the plan has; None until the walk has come to its end.
    """

    def __init__(self, plan: BatchPlan) -> None:
        self._plan = plan
        self.length: int | None = None
        self._restart()

    def take(self, wanted: range) -> list[Batch]:
        """The batches with these numbers; fewer, or none, where the plan ends before."""
        return list(self.between(wanted))

    def between(self, wanted: range) -> Iterator[Batch]:
        """The batches with these numbers, one after the other, without holding them all."""
        if wanted.start < self._at:
            self._restart()
        while self._at < wanted.start and self._ahead is not None:
            self._step()
        while self._at < wanted.stop and (batch := self._ahead) is not None:
            # One batch is read ahead, so that whoever takes the last one knows it.
            self._step()
            yield batch

    def _restart(self) -> None:
        self._batches = iter(self._plan)
        self._at = -1
        self._ahead: Batch | None = None
        self._step()

    def _step(self) -> None:
        self._at += 1
        self._ahead = next(self._batches, None)
        if self._ahead is None:
            self.length = self._at
