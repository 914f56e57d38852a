"""A dose-response of steering planted on a run, by plain SQL: nothing here comes from moescope's own measuring.

Test folders load this file by its path, as `planted.py`.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

import numpy as np
import pyarrow as pa

STRENGTHS = (1.0, 2.0)
REACHED, CONTROL, COST = 0.5, 0.05, 0.1  # nats for each unit of strength


def plant_steering(store: Any, run: Any, *, controls: int = 3, sweep: int = 0x57EE) -> str:
    """Steering that raises its target by 0.5 nats a unit of strength at every token, at a KL of 0.1; controls by about 0.05.

    Gives the sweep's id.
    """
    random = np.random.default_rng(0)
    sweep_id = str(uuid.UUID(int=sweep))
    sequences = store.fetch(
        "SELECT sequence_id, n_tokens FROM sequences WHERE run_id = ? AND n_tokens > 1 ORDER BY 1", [run.run_id]
    )
    n = np.array([tokens - 1 for _, tokens in sequences])
    effects: list[dict[str, Any]] = []
    sums: list[dict[str, Any]] = []
    for number, strength in enumerate(STRENGTHS):
        effect_id = str(uuid.UUID(int=(sweep << 40) + number))
        for draw in (None, *range(controls)):
            steered = draw is None
            name = f"latent 3 → log p of ' Python' × {strength:g}" + ("" if steered else f" (control {draw})")
            edit = {
                "kind": "latents",
                "layer": 1,
                "sae": "planted",
                "latents": [3 if steered else 4 + draw],
                "values": [1.0],
            }
            edit |= {} if strength == 1 else {"strength": strength}
            key = {
                "effect_id": effect_id, "sweep_id": sweep_id, "base_run_id": run.run_id, "run_id": None,
                "intervention": json.dumps({"format": 1, "name": name, "anatomy": None, "edits": [edit]}),
                "kind": "target" if steered else "control", "draw": draw, "group_kind": "all", "group_value": None,
            }  # fmt: skip
            noise = random.normal(0, 0.01, len(n))
            level = {"delta_target_logprob": (REACHED if steered else CONTROL) * strength, "kl": COST * strength}
            level |= {"delta_nll": COST * strength / 2, "flips": 0.01 * strength}
            level |= {"base_nll": 2.0, "base_target_logprob": -8.0} if steered else {}
            for metric, value in level.items():
                total = n * (value + (noise if metric == "delta_target_logprob" else 0.0))
                mean = float(total.sum() / n.sum())
                unit = "share" if metric == "flips" else "nats"
                effects.append(
                    {**key, "metric": metric, "value": mean, "ci_low": mean - 0.02, "ci_high": mean + 0.02,
                     "n": int(n.sum()), "unit": unit}
                )  # fmt: skip
                sums += [
                    {"effect_id": effect_id, "kind": key["kind"], "draw": draw, "sequence_id": sequence, "metric": metric,
                     "sum": float(t), "n": int(tokens)}
                    for (sequence, _), t, tokens in zip(sequences, total, n, strict=True)
                ]  # fmt: skip
    for table, rows in (("effects", effects), ("effect_sequences", sums)):
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        store.connection.register("planted_rows", pa.table(columns))
        store.connection.execute(f'INSERT INTO "{table}" BY NAME SELECT * FROM planted_rows')
        store.connection.unregister("planted_rows")
    return sweep_id
