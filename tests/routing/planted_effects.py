"""Effects planted row by row on a run, by plain SQL: nothing here comes from moescope's own measuring.

Test folders load this file by its path, as `planted.py`.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.store.run import Run

UNITS = {"base_nll": "nats", "delta_nll": "nats", "kl": "nats", "flips": "share"}


def ablation(layer: int, expert: int, *, name: str | None = None) -> dict[str, Any]:
    """An intervention that takes one expert out, as JSON holds it."""
    return {
        "format": 1,
        "name": name,
        "anatomy": None,
        "edits": [{"kind": "ablate", "layer": layer, "experts": [expert]}],
    }


def plant_effects(
    run: Run,
    *,
    effects: int = 2,
    controls: int = 3,
    names: Sequence[str | None] = (),
    seed: int = 0,
    sweep: bool = False,
) -> list[str]:
    """Plant some effects with controls on every sequence of a run, by group too; gives their ids, in the order of time.

    The intervention of effect i adds about 0.1 · (i + 1) nats to every token, its controls about nothing.
    """
    random = np.random.default_rng(seed)
    ids = []
    for number in range(effects):
        effect_id = str(uuid.UUID(int=((1 << 80) + (seed << 70) + number) << 32))
        name = names[number] if number < len(names) else None
        parts = [("target", None, 0.1 * (number + 1))] + [("control", draw, 0.0) for draw in range(controls)]
        for kind, draw, shift in parts:
            sums = _sums(run, random, shift)
            plant_one(
                run, effect_id, ablation(number, draw or 0, name=name), kind, draw, sums,
                sweep_id=str(uuid.UUID(int=7)) if sweep else None,
            )  # fmt: skip
        ids.append(effect_id)
    return ids


def plant_one(
    run: Run,
    effect_id: str,
    intervention: Mapping[str, Any],
    kind: str,
    draw: int | None,
    sums: Mapping[str, tuple[NDArray[np.floating[Any]], NDArray[np.integer[Any]]]],
    *,
    sweep_id: str | None = None,
) -> None:
    """Plant one intervention or control: metric → (sum, n) of each sequence of the run, in order."""
    sequences = run.store.fetch("SELECT sequence_id, label FROM sequences WHERE run_id = ? ORDER BY 1", [run.run_id])
    labels = [label for _, label in sequences]
    base = {
        "effect_id": effect_id, "sweep_id": sweep_id, "base_run_id": run.run_id, "run_id": None,
        "intervention": json.dumps(intervention), "kind": kind, "draw": draw,
    }  # fmt: skip
    rows = []
    by_sequence = []
    for metric, (total, n) in sums.items():
        groups: list[tuple[str, str | None, NDArray[np.bool_]]] = [("all", None, np.ones(len(labels), bool))]
        groups += [("label", label, np.array([label == x for x in labels])) for label in dict.fromkeys(labels) if label]
        groups += [("position", place, np.ones(len(labels), bool)) for place in ("1–3", "4–15", "16–63")]
        groups += [("class", name, np.ones(len(labels), bool)) for name in ("word", "space")]
        for group_kind, group_value, members in groups:
            value = float(total[members].sum() / n[members].sum())
            rows.append(
                {
                    **base, "group_kind": group_kind, "group_value": group_value, "metric": metric, "value": value,
                    "ci_low": value - 0.01, "ci_high": value + 0.01, "n": int(n[members].sum()),
                    "unit": UNITS.get(metric, "nats"),
                }
            )  # fmt: skip
        by_sequence += [
            {
                "effect_id": effect_id, "kind": kind, "draw": draw, "sequence_id": int(sequence), "metric": metric,
                "sum": float(total[i]), "n": int(n[i]),
            }
            for i, (sequence, _) in enumerate(sequences)
        ]  # fmt: skip
    _insert(run, "effects", rows)
    _insert(run, "effect_sequences", by_sequence)


def _sums(run: Run, random: np.random.Generator, shift: float) -> dict[str, Any]:
    lengths = [
        n
        for (n,) in run.store.fetch(
            "SELECT n_tokens FROM sequences WHERE run_id = ? ORDER BY sequence_id", [run.run_id]
        )
    ]
    n = np.maximum(np.array(lengths) - 1, 1)
    noise = random.normal(0, 0.02, len(n))
    return {
        "base_nll": (3.0 * n, n),
        "delta_nll": ((shift + noise) * n, n),
        "kl": ((0.02 + shift) * n, n),
        "flips": (np.minimum(0.1 + shift, 1.0) * n, n),
    }


def _insert(run: Run, table: str, rows: list[dict[str, Any]]) -> None:
    columns = list(rows[0])
    names = {"effect_id", "sweep_id", "base_run_id", "run_id", "group_value", "intervention"}
    types = {"draw": pa.int32(), **dict.fromkeys(names, pa.string())}
    arrays = {column: pa.array([row[column] for row in rows], types.get(column)) for column in columns}
    cursor = run.store.cursor()
    cursor.register("planted_effect_rows", pa.table(arrays))
    cursor.execute(f'INSERT INTO "{table}" BY NAME SELECT * FROM planted_effect_rows')
    cursor.unregister("planted_effect_rows")
