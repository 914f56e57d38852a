"""Features of an autoencoder planted row by row on a run, by plain SQL: nothing here comes from moescope's own reading.

Test folders load this file by its path, as `planted.py`.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa

from moescope.store.run import Run

LATENTS = 12
RULES = ("predicted_by_token", "predicted_by_previous_token", "predicted_by_label")


def plant_features(
    run: Run, *, latents: int = LATENTS, name: str = "planted sae", window: int = 8, seed: int = 0
) -> str:
    """Plant an autoencoder with features, examples, labels, links and scores on a run; gives its `sae_id`.

    Latent i is active on 100 · (i + 1) of 10,000 tokens, at most i + 1, and latent `latents` − 1 on none. It has two examples of
    stratum 0 and one of stratum 1, in sequences 0, 1, …, at position 3, each with activation on the peak alone. Latent 0 has
    lift 2 of the first label and ½ of the others, the last one found (q = 0.01) for both; others have lift 1. The token before
    predicts latent i with correlation 0.9 − 0.05 i, by chance 0.01. Latent 0 is the parent of 1 and 2.
    """
    sae_id = str(uuid.UUID(int=((7 << 80) + seed) << 20))
    sequences = run.store.fetch(
        "SELECT sequence_id, n_tokens, label FROM sequences WHERE run_id = ? ORDER BY 1", [run.run_id]
    )
    long = [s for s in sequences if s[1] >= window] or sequences
    labels = sorted({label for _, _, label in sequences if label is not None})
    owner = {"sae_id": sae_id, "run_id": run.run_id}
    site = "blocks.0.hook_resid_post"
    insert(
        run, "saes",
        [
            {
                "sae_id": sae_id, "name": name, "site": site, "architecture": "topk", "trained_as": "topk", "d_in": 6,
                "d_sae": latents, "model": "planted", "settings": "{}", "created_at": datetime(2026, 6, 1),
            }
        ],
    )  # fmt: skip
    alive = range(latents - 1)
    insert(run, "features", [{**owner, **_feature(i, dead=i == latents - 1)} for i in range(latents)])
    insert(run, "feature_contexts", [{**owner, **row} for i in alive for row in _contexts(i, long, window)])
    insert(run, "feature_labels", [{**owner, **row} for i in alive for row in _labels(i, labels)])
    insert(run, "feature_links", [{**owner, **row} for row in _links(sae_id, latents)])
    insert(run, "sae_measures", [{**owner, **row} for row in _measures(latents, labels)])
    return sae_id


def insert(run: Run, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows as they stand."""
    if not rows:
        return
    cursor = run.store.cursor()
    cursor.register("planted_feature_rows", pa.Table.from_pylist([dict(row) for row in rows]))
    cursor.execute(f'INSERT INTO "{table}" BY NAME SELECT * FROM planted_feature_rows')
    cursor.unregister("planted_feature_rows")


def _feature(i: int, *, dead: bool) -> dict[str, Any]:
    effects = {"raised_ids": [i, i + 1], "raised": [0.5, 0.25], "lowered_ids": [i + 2, i + 3], "lowered": [-0.5, -0.25]}
    if dead:
        return {"feature": i, "active": 0, "tokens": 10_000, "documents": 0, "decoder_norm": 1.0, **effects}
    edges = [float(x) for x in np.geomspace((i + 1) / 4, i + 1, 5)]
    counts = [40 * (i + 1), 30 * (i + 1), 20 * (i + 1), 10 * (i + 1)]
    return {
        "feature": i, "active": 100 * (i + 1), "tokens": 10_000, "documents": 5, "mean": (i + 1) / 2, "maximum": float(i + 1),
        "edges": edges, "counts": counts, "decoder_norm": 1.0, **effects,
    }  # fmt: skip


def _contexts(i: int, sequences: Sequence[tuple[Any, ...]], window: int) -> list[dict[str, Any]]:
    rows = []
    for number, (stratum, rank) in enumerate(((0, 0), (0, 1), (1, 0))):
        sequence, length, _ = sequences[number % len(sequences)]
        peak = min(3, length - 1)
        value = float(i + 1) - 0.1 * number
        activations = [value if t == peak else 0.0 for t in range(min(window, length))]
        rows.append(
            {
                "feature": i, "stratum": stratum, "rank": rank, "sequence_id": sequence, "position": peak, "value": value,
                "first_position": 0, "activations": activations,
            }
        )  # fmt: skip
    return rows


def _labels(i: int, labels: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for number, label in enumerate(labels):
        lift = 1.0 if i else 2.0 if number == 0 else 0.5
        rows.append(
            {
                "feature": i, "label": label, "active": 10, "tokens": 1000, "lift": lift, "ci_low": lift * 0.8, "ci_high": lift * 1.25,
                "p": 0.001 if i == 0 else 0.5, "q": 0.01 if i == 0 else 0.5,
            }
        )  # fmt: skip
    return rows


def _links(sae_id: str, latents: int) -> list[dict[str, Any]]:
    own = {"other_sae_id": sae_id, "ci_low": None, "ci_high": None}
    rows = [
        {
            **own,
            "kind": "cosine",
            "feature": i,
            "other_feature": (i + 1) % latents,
            "value": 0.5,
            "null_value": 0.2,
            "n": None,
        }
        for i in range(latents)
    ]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        if j < latents - 1:
            rows.append(
                {
                    "kind": "coactivation", "feature": i, "other_sae_id": sae_id, "other_feature": j, "value": 0.4, "ci_low": 0.3,
                    "ci_high": 0.5, "null_value": 0.05, "n": 50,
                }
            )  # fmt: skip
    rows += [
        {
            "kind": "family", "feature": 0, "other_sae_id": sae_id, "other_feature": j, "value": 0.8, "ci_low": 0.7, "ci_high": 0.9,
            "null_value": 0.1, "n": 80,
        }
        for j in (1, 2)
        if j < latents - 1
    ]  # fmt: skip
    return [{**row, "null_kind": "planted"} for row in rows]


def _measures(latents: int, labels: Sequence[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def add(metric: str, kind: str, group: str, value: float, null: float, unit: str, spread: float) -> None:
        base = {"metric": metric, "group_kind": kind, "group_value": group, "n": 10_000, "unit": unit}
        rows.append({**base, "condition": "sae", "value": value, "ci_low": value - spread, "ci_high": value + spread})
        rows.append({**base, "condition": "shuffled", "value": null, "ci_low": null - spread, "ci_high": null + spread})

    for i in range(latents - 1):
        for rule, value in zip(RULES, (0.3, 0.9 - 0.05 * i, 0.1), strict=True):
            add(rule, "feature", str(i), value, 0.01, "correlation", 0.05)
    for number, label in enumerate(labels[1:]):
        sets = {"a": labels[0], "b": label, "latents_a": [0, 1], "latents_b": [2]}
        add("association", "labels", json.dumps(sets), math.log(3.0) - number, 0.0, "log odds", 0.5)
    add("families", "all", "all", 1.0, 0.0, "latents", 0.0)
    add("family_members", "all", "all", 2.0, 0.0, "latents", 0.0)
    return rows
