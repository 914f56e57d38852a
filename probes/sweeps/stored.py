"""A sweep in the store: its id follows from what it does, so that a stopped one is found again and goes on."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError, RunError
from moescope.core.intervention import Intervention
from moescope.probes.effects.intervals import mean_with_interval
from moescope.probes.sweeps.base_side import METRICS
from moescope.probes.sweeps.passes import GroupSums
from moescope.probes.sweeps.screening import Screened
from moescope.probes.sweeps.variants import Variant
from moescope.store.effects import EffectRow, Measured, SequenceSums, new_effect_id, write_effects
from moescope.store.run import Run
from moescope.store.store import Store

ESTIMATE = "delta_nll_estimate"
UNITS = {"delta_nll": "nats", "kl": "nats", "flips": "share", "base_nll": "nats", ESTIMATE: "nats"}
_NAMESPACE = uuid.UUID("6c1f3f4e-2f7a-5d0b-9a55-5d6b8f6c3b10")


def sweep_id_of(base: Run, interventions: Sequence[Intervention], settings: Mapping[str, Any]) -> str:
    """The id of a sweep: the same for the same interventions against the same run, in the same order.

    Args:
        base: the run without interventions.
        interventions: of all its variants.
        settings: what else decides its numbers.
    """
    said = [
        base.run_id,
        json.dumps(dict(settings), sort_keys=True),
        *(intervention.to_json() for intervention in interventions),
    ]
    return str(uuid.uuid5(_NAMESPACE, "\n".join(said)))


def stored_effects(store: Store, sweep_id: str) -> int:
    """How many effects of a sweep are stored, whole ones."""
    query = """
        SELECT count(DISTINCT effect_id)
        FROM effects
        WHERE sweep_id = ?
    """
    return int(store.fetch(query, [sweep_id])[0][0])


def check_new(store: Store, sweep_id: str, *, resume: bool) -> int:
    """How many effects of a sweep are there already.

    Raises:
        InputError: some are, and it was not to be resumed; or the store is open for reading only.
    """
    store.check_writable()
    found = stored_effects(store, sweep_id)
    if found and not resume:
        raise InputError(
            "this sweep is in the store already, in whole or in part",
            found=f"{found:,} effects of sweep {sweep_id}",
            fix="pass resume=True (--resume): what is stored is kept, the rest is run",
        )
    return found


def write_sums(store: Store, base: Run, sweep_id: str, found: Sequence[GroupSums], *, draws: int, seed: int) -> None:
    """Store the effects of some groups, in one transaction, in the order of the sweep."""
    measured: list[Measured] = []
    for sums in found:
        rows = _rows(sums.sums, METRICS, sums.n, sums.document, draws, seed)
        plain = _rows(sums.base_nll[None, None], ("base_nll",), sums.n, sums.document, draws, seed)[0]
        at = 0
        for effect in sums.group.effects:
            effect_id = new_effect_id()
            for variant in effect:
                parts = [SequenceSums(m, sums.sequence, sums.sums[at, i], sums.n) for i, m in enumerate(METRICS)]
                if variant.kind == "target":
                    parts.append(SequenceSums("base_nll", sums.sequence, sums.base_nll, sums.n))
                measured.append(_measured(effect_id, base, sweep_id, variant, [*plain, *rows[at]], parts))
                at += 1
    write_effects(store, measured)


def write_estimates(
    store: Store, base: Run, sweep_id: str, variants: Sequence[Variant], found: Screened, *, draws: int, seed: int
) -> None:
    """Store what a screening estimated, an effect an expert, in one transaction."""
    names: list[tuple[tuple[int, str], int]] = []
    for variant in variants:
        edit: Any = variant.intervention.edits[0]
        names.append(((variant.layer, edit.block), edit.ids[0]))
    sums = np.stack([found.estimates[router][expert] for router, expert in names])
    rows = _rows(sums[:, None], (ESTIMATE,), found.n, found.document, draws, seed)
    measured = [
        _measured(
            new_effect_id(),
            base,
            sweep_id,
            variant,
            rows[i],
            [SequenceSums(ESTIMATE, found.sequence, sums[i], found.n)],
        )
        for i, variant in enumerate(variants)
    ]
    write_effects(store, measured)


def check_base(base: Run, found: GroupSums, most: float) -> None:
    """Hold the NLL of the plain passes against what the base run has.

    Args:
        base: the run.
        found: of any group.
        most: by how much the mean may differ, nats.

    Raises:
        RunError: they differ by more than rounding does.
    """
    query = """
        SELECT sequence_id, sum(nll) AS nll, count(nll) AS n
        FROM tokens
        WHERE run_id = $run AND phase = 'prefill'
        GROUP BY sequence_id
        ORDER BY sequence_id
    """
    rows = base.sql(query).fetchnumpy()
    place = np.searchsorted(rows["sequence_id"], found.sequence)
    held = place < len(rows["sequence_id"])
    held[held] = np.asarray(rows["sequence_id"])[place[held]] == found.sequence[held]
    reason = None if held.all() else f"{int((~held).sum()):,} sequences that it does not have"
    if reason is None:
        recorded = np.nan_to_num(np.asarray(rows["nll"], np.float64)[place])
        difference = float(np.abs(found.base_nll - recorded).sum() / max(found.n.sum(), 1))
        reason = f"a mean difference of {difference:.3g} nats" if difference > most else None
    if reason is not None:
        raise RunError(
            f"the unedited model does not give the numbers of its base run {base.name!r}",
            expected=f"the same NLL, within {most:g} nats on average",
            found=reason,
            fix="record a new base run with this model and these versions (leave --base out)",
        )


def _rows(
    sums: NDArray[np.float64],
    metrics: Sequence[str],
    n: NDArray[np.int64],
    document: NDArray[np.int64],
    draws: int,
    seed: int,
) -> list[list[EffectRow]]:
    """Rows of each variant from [variant, metric, sequence] sums."""
    if not n.sum():
        raise InputError(
            "no token of the corpus is predicted", found="only sequences of one token", fix="give longer texts"
        )
    variants = len(sums)
    columns = sums.reshape(variants * len(metrics), -1).T
    found = iter(mean_with_interval(columns, n, document, draws=draws, seed=seed))
    return [
        [EffectRow("all", None, metric, *next(found), int(n.sum()), UNITS[metric]) for metric in metrics]
        for _ in range(variants)
    ]


def _measured(
    effect_id: str,
    base: Run,
    sweep_id: str,
    variant: Variant,
    rows: Sequence[EffectRow],
    sequences: Sequence[SequenceSums],
) -> Measured:
    return Measured(
        effect_id,
        base.run_id,
        variant.intervention.to_json(),
        variant.kind,
        variant.draw,
        rows,
        sequences,
        sweep_id=sweep_id,
    )
