"""Running a sweep: group by group into the store, from where it was stopped."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moescope.core.errors import InputError
from moescope.probes.batches import Batch
from moescope.probes.live_model import LiveModel
from moescope.probes.sweeps.passes import SweepPasses
from moescope.probes.sweeps.progress import SweepProgress
from moescope.probes.sweeps.stored import check_base, check_new, sweep_id_of, write_sums
from moescope.probes.sweeps.variants import Group, Variant, grouped
from moescope.store.run import Run
from moescope.store.store import Store

# What is lost where a sweep is stopped: groups are written together for about so long.
_SECONDS = 20.0
# By how much mean NLLs may differ from the recorded ones, nats: other threads or kernels differ by rounding.
_ROUNDING = {"float32": 1e-3, "float64": 1e-3}
_ROUNDING_NARROW = 2e-2


@dataclass
class Sweep:
    """A sweep over batches, against a base run in a store.

    Attributes:
        model: what runs.
        batches: of the base run's texts, numbered as there.
        variants: by effect.
        store, base: where the effects go, and the run they are measured against.
        label: what is counted: `experts`.
        settings: what decides its numbers besides the interventions.
        pass_size: pairs of a variant and a sequence that share one edited pass.
        draws, seed: of the intervals.
        sources: run name → run, for edits that replay a recorded one.
        before: effects of the sweep that something else has written (a screening).
    """

    model: LiveModel
    batches: Sequence[Batch]
    variants: Sequence[Variant]
    store: Store
    base: Run
    label: str
    settings: Mapping[str, Any]
    pass_size: int = 8
    draws: int = 1000
    seed: int = 0
    sources: Mapping[str, Any] | None = None
    sweep_id: str | None = None
    before: int = 0

    def __post_init__(self) -> None:
        if not self.variants:
            raise InputError("this sweep has nothing to run")
        if self.sweep_id is None:
            self.sweep_id = sweep_id_of(self.base, [v.intervention for v in self.variants], self.settings)
        self.passes = SweepPasses(self.model, self.pass_size, sources=self.sources or {})

    @property
    def groups(self) -> list[Group]:
        """Variants that are written together."""
        return list(grouped(self.variants))

    def run(self, *, resume: bool = False, progress: bool = True) -> str:
        """Run what is not stored yet; gives the sweep's id.

        What was measured is stored about every 20 seconds, whole groups of effects in one transaction: a sweep that is
        stopped, killed or interrupted loses no more than that, and goes on with `resume=True`.

        Raises:
            InputError: it is stored already, and `resume` is not set; an edit that the model cannot take.
            RunError: an edit after which logits are no numbers; what was stored before stays.
            KeyboardInterrupt: after Ctrl-C; what was stored before stays.
        """
        assert self.sweep_id is not None
        done = max(0, check_new(self.store, self.sweep_id, resume=resume) - self.before)
        left, skipped = self._left(done)
        sequences = sum(len(batch.sequences) for batch in self.batches)
        with SweepProgress(self.label, len(self.variants), sequences, done=skipped, shown=progress) as bar:
            number = 1
            while left:
                unit, left = left[:number], left[number:]
                started = time.perf_counter()
                found = self.passes.run(unit, self.batches, bar.tick)
                check_base(self.base, found[0], _ROUNDING.get(self.model.settings()["dtype"], _ROUNDING_NARROW))
                write_sums(self.store, self.base, self.sweep_id, found, draws=self.draws, seed=self.seed)
                each = (time.perf_counter() - started) / len(unit)
                number = max(1, int(_SECONDS / max(each, 1e-6)))
        return self.sweep_id

    def _left(self, effects: int) -> tuple[list[Group], int]:
        """Groups that are not stored, and how many variants are: groups are stored whole and in order."""
        groups, skipped = self.groups, 0
        while groups and effects > 0:
            effects -= len(groups[0].effects)
            skipped += len(groups[0].variants)
            groups = groups[1:]
        if effects < 0:
            raise InputError(
                f"sweep {self.sweep_id} cannot go on",
                found="effects in the store that this sweep does not write in this order",
            )
        return groups, skipped
