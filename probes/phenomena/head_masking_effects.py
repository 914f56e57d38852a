"""What masking heads did to needle trials, as an effect on the run of those trials."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from moescope.core.errors import InputError
from moescope.core.statistics import bootstrap_ratio
from moescope.probes.phenomena.head_masking import UNITS, HeadMasking
from moescope.probes.phenomena.needle_prompts import NeedlePrompt
from moescope.store.effects import EffectRow, Measured, SequenceSums, new_effect_id, write_effects
from moescope.store.run import Run

# Metric of masking → the word it has among effects. Text NLL is of other texts, under masks everywhere: not of this run.
WORDS = {
    "answer NLL": "nll",
    "needle recall": "needle_recall",
    "needle found": "needle_found",
    "needle exact": "needle_exact",
}
_HASHES = "SELECT content_hash FROM sequences WHERE run_id = ? ORDER BY sequence_id"


def store_masking(
    masking: HeadMasking, prompts: Sequence[NeedlePrompt], base: Run, *, draws: int = 1000, seed: int = 0
) -> str:
    """Write it as an effect with its controls (tables `effects`, `effect_sequences`), for the analyses of effects.

    Metrics are `delta_nll` (of the needle's own answer, over its tokens), `delta_needle_recall`, `delta_needle_found` and
    `delta_needle_exact` (over trials), each with its `base_…`.

    Args:
        masking: from `mask_heads`.
        prompts: those it was given.
        base: the run of `retrieval_heads` over the same prompts, in its store.
        draws, seed: of the bootstrap over trials.

    Returns:
        The effect's id.

    Raises:
        InputError: the run is of other prompts.
    """
    hashes = [hashlib.sha256(np.array(p.ids, "<i8").tobytes()).hexdigest() for p in prompts]
    recorded = [row[0] for row in base.store.fetch(_HASHES, [base.run_id])]
    if hashes != recorded:
        raise InputError(
            f"run {base.name!r} is not of these prompts",
            expected=f"its {len(recorded)} trials, in their order",
            found=f"{len(hashes)} prompts, of which {len(set(hashes) & set(recorded))} are among them",
            fix="give retrieval_heads and mask_heads the same prompts",
        )
    effect_id = new_effect_id()
    measured = []
    for number, intervention in enumerate(masking.interventions[1:], start=1):
        rows, sequences = [], []
        for metric, word in WORDS.items():
            n = masking.n[metric]
            parts = {f"delta_{word}": masking.sums[metric][number] - masking.sums[metric][0]}
            parts |= {f"base_{word}": masking.sums[metric][0]} if number == 1 else {}
            for name, sums in parts.items():
                value, low, high = bootstrap_ratio(sums, n.astype(np.float64), draws=draws, seed=seed)
                less, more = (None if np.isnan(bound) else float(bound) for bound in (low, high))
                unit = "nats" if word == "nll" else UNITS[metric]
                rows.append(EffectRow("all", None, name, float(value), less, more, int(n.sum()), unit))
                sequences.append(SequenceSums(name, np.arange(len(n)), sums, n))
        first = number == 1
        measured.append(
            Measured(
                effect_id,
                base.run_id,
                intervention.to_json(),
                "target" if first else "control",
                None if first else number - 2,
                rows,
                sequences,
            )
        )
    write_effects(base.store, measured)
    return effect_id
