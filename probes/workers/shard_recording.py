"""Recording a few batches of a plan into a store of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moescope.probes.batches import Batch
from moescope.probes.corpus import Corpus
from moescope.probes.live_model import LiveModel
from moescope.probes.probe import Probe
from moescope.probes.recording import Recording
from moescope.probes.routing_rule import BoundRule
from moescope.store.run import Run
from moescope.store.store import Store


@dataclass
class _Part:
    """Batches in place of a whole plan."""

    batches: Sequence[Batch]
    batch_size: int
    split_documents: int = 0
    single_tokens: int = 0

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


class ShardRecording(Recording):
    """A recording of some batches of a plan. Their numbers, and those of their sequences, are the plan's; tokens start at 0.

    Args:
        model, corpus, store, name, options: as for `Recording`; the corpus is the whole one.
        batches: to record, in order.
        plan_batches: how many batches the plan has, where that is known.
        rules: routing rules that an earlier recording of this plan found; None to look for them, and to try the taps.
    """

    def __init__(
        self,
        model: LiveModel,
        corpus: Corpus,
        store: Store,
        *,
        name: str,
        batches: Sequence[Batch],
        plan_batches: int | None,
        rules: Mapping[tuple[int, str], BoundRule] | None,
        **options: Any,
    ) -> None:
        self._rules = rules
        super().__init__(model, corpus, store, name=name, **options)
        self.whole = self.plan
        self._numbers = [batches[0].number, batches[-1].number + 1] if batches else [0, 0]
        self._plan_batches = plan_batches
        self.plan = _Part(batches, self.whole.batch_size)  # type: ignore[assignment]  # all that a recording asks of a plan

    def _looked_first(self) -> list[Probe]:
        if self._rules is None:
            return super()._looked_first()
        self.context.rules = self._rules
        return [entry.function(self.context) for entry in self.entries]

    def _end(self, run: Run, seconds: float, failure: BaseException | None) -> None:
        super()._end(run, seconds, failure)
        part = {"batches": self._numbers}
        found = {} if self._plan_batches is None else {"plan_batches": self._plan_batches}
        self.store.connection.execute(
            """
            UPDATE runs
            SET settings = json_merge_patch(settings, ?), summary = json_merge_patch(summary, ?)
            WHERE run_id = ?
            """,
            [json.dumps(part), json.dumps(found), run.run_id],
        )
