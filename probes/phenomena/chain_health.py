"""Whether a model still writes once the chain's writer is cut: repetition in greedy continuations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from moescope.core.errors import InputError
from moescope.probes.batches import BatchPlan
from moescope.probes.effects.generation_health import METRICS, generation_health
from moescope.probes.live_model import LiveModel
from moescope.probes.phenomena.chain import CutEffect
from moescope.probes.phenomena.chain_cuts import WRITER
from moescope.probes.phenomena.chain_rows import repetition_rows


def with_repetition(
    model: LiveModel, plan: BatchPlan, effects: Sequence[CutEffect], *, tokens: int, prompts: int, seed: int
) -> tuple[list[CutEffect], str | None]:
    """Effects with rows of repetition added to the writer's cut and its controls, and why there are none.

    Args:
        model: what writes.
        plan: the texts; prompts are their beginnings.
        effects: of the chain.
        tokens: written after each prompt.
        prompts: how many.
        seed: of the bootstrap over prompts.
    """
    found = list(effects)
    number = next((n for n, effect in enumerate(found) if effect.cut.link == WRITER), None)
    if number is None:
        return found, None
    effect = found[number]
    variants = [effect.cut.target, *effect.cut.controls]
    try:
        health = generation_health(model, plan, variants, tokens=tokens, prompts=prompts)
    except InputError as refused:
        return found, f"Nothing was generated under the writer's cut: {refused}"
    values = health.values[:, METRICS.index("repetition")]
    rows = [tuple(repetition_rows(values[0], part, seed=seed)) for part in values[1:]]
    found[number] = dataclasses.replace(
        effect,
        target=effect.target + rows[0],
        controls=tuple(own + more for own, more in zip(effect.controls, rows[1:], strict=True)),
    )
    return found, None
