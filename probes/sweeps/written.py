"""Whether a model still writes under each dose: the coherence side of a dose-response."""

from __future__ import annotations

from moescope.core.intervention import Intervention
from moescope.probes.batches import BatchPlan
from moescope.probes.effects.generation_health import generation_health
from moescope.probes.effects.measure import health_rows
from moescope.probes.sweeps.sweep import Sweep
from moescope.store.effects import Measured, new_effect_id, write_effects

_STORED = """
    SELECT count(*)
    FROM effects
    WHERE sweep_id = ? AND metric LIKE 'delta_repetition'
"""


def write_health(sweep: Sweep, plan: BatchPlan, *, tokens: int, prompts: int) -> None:
    """Continue texts under every variant of a sweep and store what is written, unless it is stored already.

    Args:
        sweep: whose effects are stored.
        plan: the corpus.
        tokens: written after each prompt, at most.
        prompts: how many texts are continued.
    """
    if sweep.store.fetch(_STORED, [sweep.sweep_id])[0][0]:
        return
    variants: list[Intervention] = [v.intervention for v in sweep.variants]
    health = generation_health(sweep.model, plan, variants, tokens=tokens, prompts=prompts, sources=sweep.sources)
    measured = []
    for number, variant in enumerate(sweep.variants):
        rows, sums = health_rows(health, number, seed=sweep.seed)
        measured.append(
            Measured(
                new_effect_id(), sweep.base.run_id, variant.intervention.to_json(), variant.kind, variant.draw, rows, sums,
                sweep_id=sweep.sweep_id,
            )
        )  # fmt: skip
    write_effects(sweep.store, measured)
