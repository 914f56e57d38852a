"""Keeping a circuit in a store: what its prompts were, numbers of heads, and the two cuts as effects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.statistics import bootstrap_ratio
from moescope.probes.phenomena.head_map import HeadMap
from moescope.sae.circuits.ablation import Ablation
from moescope.sae.circuits.prompts import CircuitTask, Prompt
from moescope.sae.circuits.scores import CodeScores
from moescope.store.effects import EffectRow, Measured, SequenceSums, new_effect_id, write_effects
from moescope.store.run import Run
from moescope.store.sae_rows import write_rows
from moescope.store.store import Store

Floats = NDArray[np.float64]
_UNIT = "logits"


def labelled(fit: CircuitTask, test: Sequence[Prompt]) -> list[tuple[Prompt, str]]:
    """Every prompt of a circuit's run with its side, in the order of its sequences."""
    return [
        *((p, "positive") for p in fit.positives),
        *((p, "negative") for p in fit.negatives),
        *((p, "held out") for p in test),
    ]


def facts_of(
    fit: CircuitTask, test: Sequence[Prompt], codes: NDArray[np.int64], ablation: Ablation | None
) -> list[dict[str, Any]]:
    """What each prompt was: its answers, and the codes of heads or the logit difference."""
    found = []
    for number, (prompt, label) in enumerate(labelled(fit, test)):
        facts: dict[str, Any] = {"task": fit.name, "side": label}
        facts |= {"answers": list(prompt.answers), "wrong": list(prompt.wrong)} if prompt.answers else {}
        if number < len(codes):
            facts["codes"] = codes[number].tolist()
        elif ablation is not None:
            facts["logit_difference"] = float(ablation.value[0, number - len(codes)])
        found.append(facts)
    return found


def write_heads(
    store: Store, run: Run, condition: str, task: str, heads: HeadMap, scores: CodeScores, member: NDArray[np.bool_],
    known: Floats | None,
) -> None:  # fmt: skip
    """Write the rows of `heads`: scores, counts, chance levels and members, under the task's name as condition."""
    metrics: dict[str, NDArray[Any]] = {
        "circuit_score": scores.score, "circuit_codes": scores.count, "circuit_codes_null": scores.null,
        "circuit_p": scores.p, "circuit_member": member,
    }  # fmt: skip
    metrics |= {} if known is None else {"circuit_known": known}
    name = task if condition == "base" else f"{task}, {condition}"
    n = len(run.store.fetch("SELECT 1 FROM sequences WHERE run_id = ? AND label <> 'held out'", [run.run_id]))
    rows = [
        {
            "run_id": run.run_id, "layer": place.layer, "block": place.block, "head": head, "metric": metric, "condition": name,
            "value": float(value), "n": n,
        }
        for metric, values in metrics.items()
        for place, part in heads.split(values.astype(np.float64))
        for head, value in enumerate(part)
        if np.isfinite(value)
    ]  # fmt: skip
    write_rows(store, {"heads": rows})


def write_cuts(store: Store, run: Run, ablation: Ablation, first: int, seed: int) -> tuple[str, ...]:
    """Two effects, each with its random sets: the circuit cut, and all else cut."""
    sequence = np.arange(ablation.value.shape[1]) + first
    draws = (len(ablation.names) - 4) // 2
    measured, ids = [], []
    for target, controls in ((1, range(4, 4 + draws)), (2, range(4 + draws, 4 + 2 * draws))):
        effect_id = new_effect_id()
        ids.append(effect_id)
        for number in (target, *controls):
            draw = None if number == target else number - controls.start
            parts = {"delta_logit_difference": ablation.value[number] - ablation.value[0]}
            parts |= {"base_logit_difference": ablation.value[0]} if draw is None else {}
            if draw is None:
                parts["all_at_mean_logit_difference"] = ablation.value[3]
            measured.append(
                Measured(
                    effect_id, run.run_id, ablation.interventions[number].to_json(), "target" if draw is None else "control", draw,
                    [_effect_row(metric, sums, seed) for metric, sums in parts.items()],
                    [SequenceSums(metric, sequence, sums, np.ones(len(sums), np.int64)) for metric, sums in parts.items()],
                )
            )  # fmt: skip
    write_effects(store, measured)
    return tuple(ids)


def _effect_row(metric: str, sums: Floats, seed: int) -> EffectRow:
    value, lower, upper = (float(v) for v in bootstrap_ratio(sums, np.ones(len(sums)), seed=seed))
    low, high = (None if np.isnan(bound) else bound for bound in (lower, upper))
    return EffectRow("all", None, metric, value, low, high, len(sums), _UNIT)
