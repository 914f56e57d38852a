"""The screened sweep: every expert estimated at once, the highest and a random sample of the others run exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moescope.core.edit_kinds.experts import How
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.probes.sweeps.screening import Screened, screen
from moescope.probes.sweeps.stored import check_new, sweep_id_of, write_estimates
from moescope.probes.sweeps.sweep import Sweep
from moescope.probes.sweeps.variants import Variant

SAMPLED = " (drawn at random)"


@dataclass
class ScreenedSweep:
    """A sweep of experts by estimate.

    Attributes:
        sweep: of every expert, exact: what this stands for.
        how: how experts are taken out.
        top: so many with the highest estimates are run exactly.
        verify: so many of the others, at random.
        layers: of the experts; None for all.
    """

    sweep: Sweep
    how: How
    top: int
    verify: int
    layers: Sequence[int] | None = None

    def run(self, *, resume: bool = False, progress: bool = True) -> str:
        """Estimate, store the estimates, run and store the chosen experts; gives the sweep's id.

        Raises:
            InputError: nothing to be run exactly, or as `Sweep.run`.
        """
        if self.top + self.verify < 1:
            raise InputError("an estimate is not shown alone", fix="run some experts exactly: screen or verify over 0")
        whole = self.sweep
        # Words of the sweep's id, as in `SweepRequest.run`.
        settings = {**whole.settings, "screen": self.top, "sample": self.verify}
        sweep_id = sweep_id_of(whole.base, [v.intervention for v in whole.variants], settings)
        stored = check_new(whole.store, sweep_id, resume=resume)
        found = screen(whole.model, whole.batches, how=self.how, layers=self.layers)
        if not stored:
            write_estimates(
                whole.store, whole.base, sweep_id, whole.variants, found, draws=whole.draws, seed=whole.seed
            )
        chosen = self.chosen(found)
        exact = replace(whole, variants=chosen, sweep_id=sweep_id, before=len(whole.variants))
        return exact.run(resume=True, progress=progress)

    def chosen(self, found: Screened) -> list[Variant]:
        """The experts to run, in the order of the sweep; those drawn at random say so in their names."""
        estimates = np.array([_mean(found, variant) for variant in self.sweep.variants])
        order = np.argsort(-estimates, kind="stable")
        top = set(order[: self.top].tolist())
        others = np.array(sorted(set(order.tolist()) - top), dtype=np.int64)
        generator = np.random.default_rng([self.sweep.seed, len(estimates)])
        drawn = set(generator.choice(others, min(self.verify, len(others)), replace=False).tolist())
        chosen = [
            _renamed(variant, SAMPLED if number in drawn else "")
            for number, variant in enumerate(self.sweep.variants)
            if number in top or number in drawn
        ]
        return [replace(variant, effect=number) for number, variant in enumerate(chosen)]


def _mean(found: Screened, variant: Variant) -> float:
    edit: Any = variant.intervention.edits[0]
    return float(found.estimates[variant.layer, edit.block][edit.ids[0]].sum() / max(found.n.sum(), 1))


def _renamed(variant: Variant, more: str) -> Variant:
    given = variant.intervention
    return replace(variant, intervention=Intervention(given.edits, name=f"{given.name}{more}", anatomy=given.anatomy))
