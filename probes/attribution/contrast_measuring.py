"""Interventions of a contrast and their controls, measured on prompts that did not choose them, and stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from moescope.core.errors import MoescopeError
from moescope.core.intervention import Intervention
from moescope.probes.attribution.contrast_estimates import BOTH, Sums, estimates, loss_sums, preference_sums
from moescope.probes.attribution.contrast_prompts import Halves
from moescope.probes.attribution.contrast_result import UNITS, Tested
from moescope.probes.claim import claimed
from moescope.probes.effects.controls import controls_for, loads_of
from moescope.probes.failures import explained
from moescope.probes.live_model import LiveModel
from moescope.store.effects import EffectRow, Measured, SequenceSums, new_effect_id, write_effects
from moescope.store.run import Run
from moescope.store.store import Store


def measured(
    model: LiveModel,
    halves: Halves,
    chosen_on: Run,
    interventions: Sequence[Intervention],
    controls: int,
    continuations: tuple[Sequence[str | Sequence[int]], Sequence[str | Sequence[int]]],
    passes: dict[str, Any],
    *,
    draws: int,
    seed: int,
) -> tuple[list[Tested], list[Sums], tuple[str, ...]]:
    """Measure interventions and their controls on the half that did not choose them.

    Args:
        model: what runs.
        halves: the prompts.
        chosen_on: the run of the other half; tells how often each expert is chosen, which controls match.
        interventions: to be tested.
        controls: random sets for each.
        continuations: desired and undesired ones; none of both for no preference.
        passes: batch_size and max_length.
        draws: bootstrap resamples.
        seed: of controls and resamples.

    Returns:
        what was measured, the sums by prompt behind it ([variant] in the order of interventions, each followed by its
        controls), and what to say of the controls.

    Raises:
        InputError: an intervention that the model cannot take, prompts of one token, a prompt that is too long.
        RunError: predictions that are no numbers, or a model that failed.
    """
    loads = loads_of(chosen_on)
    drawn = [controls_for(one, model, loads=loads, draws=controls, seed=seed) for one in interventions]
    variants = [v for one, others in zip(interventions, drawn, strict=True) for v in (one, *others.interventions)]
    first, (desired, undesired) = halves.labels[0], continuations
    with claimed(model.module, "a contrast"):
        try:
            sums = [loss_sums(model, halves.tested_on, first, variants, **passes)]
            if desired or undesired:
                wanted: dict[str, Any] = {"desired": desired, "undesired": undesired}
                sums.append(preference_sums(model, halves.tested_on, first, variants, **wanted, **passes))
        except MoescopeError:
            raise
        except Exception as failure:  # whatever a model may raise, told as its failure
            raise explained(failure) from failure
    found = [estimates(one, draws=draws, seed=seed) for one in sums]
    whole = iter([tuple(e for part in found for e in part[variant]) for variant in range(len(variants))])
    tested = [
        Tested(one, others.interventions, tuple(next(whole) for _ in range(1 + len(others.interventions))))
        for one, others in zip(interventions, drawn, strict=True)
    ]
    notes = tuple(dict.fromkeys(note for others in drawn for note in others.notes))
    return tested, sums, notes


def keep(store: Store, base: Run, tested: Sequence[Tested], sums: Sequence[Sums], labels: tuple[str, str]) -> None:
    """Write everything into `effects` and `effect_sequences`, in one transaction.

    Args:
        store: open for writing.
        base: the run of the prompts tested.
        tested, sums: of `measured`.
        labels: names of the sets.
    """
    groups = {"a": ("label", labels[0]), "b": ("label", labels[1]), BOTH: ("contrast", f"{labels[0]} − {labels[1]}")}
    measured, variant = [], 0
    for one in tested:
        effect_id = new_effect_id()
        for number, (intervention, rows_of) in enumerate(
            zip((one.intervention, *one.controls), one.estimates, strict=True)
        ):
            rows = [
                EffectRow(
                    *groups[e.side],
                    e.metric,
                    e.value,
                    _known(e.low),
                    _known(e.high),
                    e.n,
                    UNITS[e.metric].split(" ")[0],
                )
                for e in rows_of
            ]
            parts = [
                SequenceSums(metric, part.sequence, values[variant], part.n.astype("int64"))
                for part in sums
                for metric, values in part.values.items()
            ]
            kind: Any = "target" if number == 0 else "control"
            draw = None if number == 0 else number - 1
            measured.append(Measured(effect_id, base.run_id, intervention.to_json(), kind, draw, rows, parts))
            variant += 1
    write_effects(store, measured)


def _known(bound: float) -> float | None:
    return None if math.isnan(bound) else bound
