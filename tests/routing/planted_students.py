"""Students of an MLP and a circuit of heads, planted row by row with plain SQL: nothing here comes from moescope's own measuring.

Test folders load this file by its path, as `planted.py`.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.store.run import Run

CUT, KEEP = "circuit at its mean", "all other heads at their mean"


def plant_students(run: Run, *, layer: int = 0, active: Sequence[int] = (16, 64), experts: int = 512) -> None:
    """Mixtures 0.2 better than dense students on real inputs, and no better on Gaussian ones."""
    rows: list[dict[str, Any]] = []
    for inputs, gain in (("real", 0.2), ("gaussian", 0.0)):
        for number, h in enumerate(active):
            dense = 0.6 - 0.1 * number
            rows += [
                _student("dense", inputs, h, "fvu", dense, share=h / 1000),
                _student("moe", inputs, h, "fvu", dense - gain, share=h / 1000 + 0.2, experts=experts),
                _student("moe", inputs, h, "gain", gain, share=h / 1000 + 0.2, experts=experts),
                _student("moe", inputs, h, "gain_equal_share", gain - 0.1, share=h / 1000 + 0.2, experts=experts),
                _student("moe", inputs, h, "experts_used", 0.9, share=h / 1000 + 0.2, experts=experts, interval=False),
                _student("moe", inputs, h, "fvu", dense - gain / 2, share=h / 1000 + 0.02, experts=experts, rank=8),
                _student("moe", inputs, h, "gain", gain / 2, share=h / 1000 + 0.02, experts=experts, rank=8),
            ]
        rows += [
            _student("linear", inputs, 0, "fvu", 0.7, share=0.3),
            _student("mean", inputs, 0, "fvu", 1.0, share=0.001),
        ]
    for number, h in enumerate(active):
        options: dict[str, Any] = {"share": h / 1000 + 0.2, "experts": experts}
        rows.append(_student("moe", "gaussian − real", h, "fvu", 0.2, **options))
        rows.append(_student("moe", "gaussian − real", h, "gain", -0.2, **options))
        rows.append(_student("moe", "real", h, "nmi", 0.5 + 0.1 * number, **options))
        rows.append(_student("moe", "real", h, "nmi_shuffled", 0.1, **options))
    for row in rows:
        row |= {"layer": layer, "block": "mlp"}
    _insert(run, "mlp_students", rows, {"experts": pa.int32(), "router_rank": pa.int32()})


def _student(
    student: str, inputs: str, active: int, metric: str, value: float, *, share: float, experts: int | None = None,
    rank: int | None = None, interval: bool = True,
) -> dict[str, Any]:  # fmt: skip
    return {
        "student": student, "inputs": inputs, "experts": experts, "active": active, "share": share, "router_rank": rank,
        "metric": metric, "value": value, "ci_low": value - 0.05 if interval else None,
        "ci_high": value + 0.05 if interval else None, "n": 200, "settings": json.dumps({"vectors": 1000}),
    }  # fmt: skip


def plant_circuit(
    run: Run,
    *,
    layers: int = 3,
    heads: int = 4,
    members: Sequence[tuple[int, int]] = ((1, 2), (2, 0)),
    known: Sequence[tuple[int, int]] | None = None,
    task: str = "ioi",
    draws: int = 4,
    seed: int = 0,
) -> None:
    """A circuit whose heads have 9 codes of their own and others 2; cutting it takes 3 logits to 1, cutting random heads to 2.9.

    Kept alone it holds 2.5, random heads alone 0.5; with all heads at their mean 0 is left. Logit differences are of every
    sequence of the run, with a little noise that sums to 0.
    """
    rows = []
    for layer in range(layers):
        for head in range(heads):
            member = (layer, head) in set(members)
            values = {
                "circuit_codes": 9.0 if member else 2.0, "circuit_codes_null": 2.1, "circuit_p": 0.001 if member else 0.6,
                "circuit_score": 0.3 if member else 0.02, "circuit_member": float(member),
            }  # fmt: skip
            values |= {} if known is None else {"circuit_known": 0.8 if (layer, head) in set(known) else 0.05}
            rows += [
                {"layer": layer, "head": head, "block": "attn", "metric": m, "condition": task, "value": v, "n": 40}
                for m, v in values.items()
            ]
    _insert(run, "heads", rows)
    count = len(run.store.fetch("SELECT 1 FROM sequences WHERE run_id = ?", [run.run_id]))
    noise = np.random.default_rng(seed).normal(0, 0.1, count)
    noise -= noise.mean()
    base = 3.0 + noise
    for number, (name, target, control) in enumerate(((CUT, 1.0, 2.9), (KEEP, 2.5, 0.5))):
        effect = str(uuid.UUID(int=((1 << 78) + (seed << 70) + number) << 32))
        intervention = json.dumps({"format": 1, "name": name, "anatomy": None, "edits": []})
        parts = {
            "delta_logit_difference": target - base,
            "base_logit_difference": base,
            "all_at_mean_logit_difference": 0 * base,
        }
        _plant_cut(run, effect, intervention, "target", None, parts)
        for draw in range(draws):
            one = control + 0.01 * (draw - (draws - 1) / 2)
            other = json.dumps({"format": 1, "name": f"random, draw {draw}", "anatomy": None, "edits": []})
            _plant_cut(run, effect, other, "control", draw, {"delta_logit_difference": one - base})


def _plant_cut(
    run: Run, effect: str, intervention: str, kind: str, draw: int | None, parts: dict[str, NDArray[np.float64]]
) -> None:
    sequences = [
        s for (s,) in run.store.fetch("SELECT sequence_id FROM sequences WHERE run_id = ? ORDER BY 1", [run.run_id])
    ]
    key = {"effect_id": effect, "kind": kind, "draw": draw}
    effects = [
        {
            **key, "base_run_id": run.run_id, "intervention": intervention, "group_kind": "all", "metric": metric,
            "value": float(sums.mean()), "ci_low": float(sums.mean()) - 0.1, "ci_high": float(sums.mean()) + 0.1, "n": len(sums),
            "unit": "logits",
        }
        for metric, sums in parts.items()
    ]  # fmt: skip
    by_sequence = [
        {**key, "sequence_id": sequence, "metric": metric, "sum": float(value), "n": 1}
        for metric, sums in parts.items()
        for sequence, value in zip(sequences, sums, strict=True)
    ]
    _insert(run, "effects", effects, {"draw": pa.int32()}, owner=False)
    _insert(run, "effect_sequences", by_sequence, {"draw": pa.int32()}, owner=False)


def _insert(
    run: Run, table: str, rows: list[dict[str, Any]], types: dict[str, pa.DataType] | None = None, *, owner: bool = True
) -> None:
    arrays = {c: pa.array([row[c] for row in rows], (types or {}).get(c)) for c in rows[0]}
    cursor = run.store.cursor()
    cursor.register("planted_rows_of_students", pa.table(arrays))
    own = "?::UUID AS run_id, " if owner else ""
    cursor.execute(
        f'INSERT INTO "{table}" BY NAME SELECT {own}* FROM planted_rows_of_students', [run.run_id] if owner else []
    )
    cursor.unregister("planted_rows_of_students")
