"""Sweeps written into a store as they would have been measured: sums by sequence, and the rows that follow from them."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moescope.core.edit_kinds.experts import Ablate, Keep, RandomRouting, TopK
from moescope.core.intervention import Intervention
from moescope.store.effects import EffectRow, Measured, SequenceSums, new_effect_id, write_effects
from moescope.store.run import Run

UNITS = {"flips": "share", "delta_repetition": "share"}


def plant_sweep(
    run: Run, effects: Sequence[Sequence[tuple[Intervention, Mapping[str, Any]]]], *, tokens: int = 10
) -> str:
    """Write a sweep: each effect is its intervention and then its controls, each with metric → [sequence] sums over `tokens`."""
    sweep_id = str(uuid.uuid4())
    measured = []
    for effect in effects:
        effect_id = new_effect_id()
        for number, (intervention, metrics) in enumerate(effect):
            rows, sums = [], []
            for metric, given in metrics.items():
                total = np.asarray(given, np.float64)
                n = np.full(len(total), tokens)
                unit = UNITS.get(metric, "nats")
                rows.append(EffectRow("all", None, metric, total.sum() / n.sum(), None, None, int(n.sum()), unit))
                sums.append(SequenceSums(metric, np.arange(len(total)), total, n))
            kind: Any = "target" if number == 0 else "control"
            draw = None if number == 0 else number - 1
            measured.append(
                Measured(effect_id, run.run_id, intervention.to_json(), kind, draw, rows, sums, sweep_id=sweep_id)
            )
    write_effects(run.store, measured)
    return sweep_id


def numbers(delta: Any) -> dict[str, Any]:
    """The metrics of an exact pass, of which only ΔNLL matters."""
    delta = np.asarray(delta, np.float64)
    return {
        "base_nll": np.full(len(delta), 20.0),
        "delta_nll": delta,
        "kl": np.abs(delta),
        "flips": np.zeros(len(delta)),
    }


def every_sweep(run: Run, *, layers: int, n_experts: int, sequences: int) -> None:
    """One small sweep of every kind, of random numbers."""
    random = np.random.default_rng(0)

    def drawn() -> dict[str, Any]:
        return numbers(random.normal(1, 1, sequences))

    experts = [(layer, expert) for layer in range(layers) for expert in range(n_experts)]
    plant_sweep(run, [[(Intervention([Ablate(layer=a, experts=e)]), drawn())] for a, e in experts])
    for kind, word in ((Ablate, "lowest"), (Keep, "highest")):
        sets = [
            [
                (Intervention([kind(layer=a, experts=range(size)) for a in range(layers)], name=name), drawn())
                for name in (f"{word} by load", "random", "random")
            ]
            for size in (2, 4)
        ]
        plant_sweep(run, sets)
    places = [tuple(range(layers)), *((layer,) for layer in range(layers))]
    plant_sweep(
        run,
        [
            [(Intervention([TopK(layer=a, k=k) for a in place], name=f"top-{k}"), drawn())]
            for place in places
            for k in (1, 4)
        ],
    )
    plant_sweep(
        run,
        [
            [(Intervention([RandomRouting(layer=a, seed=s) for a in place], name="random routing"), drawn())]
            for place in places
            for s in range(3)
        ],
    )
    cut = Ablate(layer=0, experts=0)
    doses = [Intervention([cut]).with_strength(s).named(f"cut × {s:g}") for s in (0.5, 1.0)]
    plant_sweep(run, [[(dose, drawn() | {"delta_repetition": random.normal(size=sequences)})] for dose in doses])
