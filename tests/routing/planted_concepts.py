"""Sparse probes and descriptions planted row by row on a run, by plain SQL: nothing here comes from moescope's own measuring.

Test folders load this file by its path, as `planted.py`.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from moescope.store.run import Run

METRICS = {"F1": 0.8, "precision": 0.9, "recall": 0.72, "MCC": 0.6, "AUC": 0.88, "log_loss": 0.4}
PERMUTED, RANDOM = "labels permuted over documents", "random units"


def plant_concepts(run: Run, *, sae_id: str | None = None) -> None:
    """Probes of every label over experts, neurons and latents with k = 1, 2, 4 and all, and descriptions with scores."""
    sae = sae_id or plant_sae(run)
    labels = [
        label
        for (label,) in run.store.fetch(
            "SELECT DISTINCT label FROM sequences WHERE run_id = ? AND label IS NOT NULL ORDER BY 1", [run.run_id]
        )
    ]
    for label in labels or ["class: word"]:
        plant_probe(run, "expert", "hook_expert_indices", label)
        plant_probe(run, "neuron", "blocks.0.mlp.experts.hook_post", label, plus=0.05)
        plant_probe(run, "latent", "blocks.0.hook_resid_post", label, plus=0.1, sae=sae)
    texts = [
        *(labels or ["words"])[:6], "commas after names of places, which here is a long description that no axis has room for",
    ]  # fmt: skip
    for number, text in enumerate(texts):
        shift = 0.02 * number
        plant_description(run, "latent", number, text, {"detection": (0.7 + shift, 0.55)}, sae=sae)
    plant_description(
        run, "expert", 1, "numbers", {"detection": (0.9, 0.5), "fuzzing": (0.8, 0.6), "causal": (0.02, 0.001)}
    )
    plant_description(run, "expert", 0, "never scored", {})


def plant_sae(run: Run, name: str = "planted-probes") -> str:
    """An autoencoder's row; gives its id."""
    sae = str(uuid.uuid4())
    row = {
        "sae_id": sae, "name": f"{name}-{sae[:6]}", "site": "blocks.0.hook_resid_post", "architecture": "topk", "d_in": 6,
        "d_sae": 16, "trained_on": run.run_id, "settings": json.dumps({"held_out": 0.1}),
    }  # fmt: skip
    _insert(run, "saes", [row], of_run=False)
    return sae


def plant_probe(
    run: Run,
    kind: str,
    site: str,
    concept: str,
    *,
    plus: float = 0.0,
    sae: str | None = None,
    ks: Sequence[int] = (1, 2, 4),
    f1: Mapping[int, float] | None = None,
    ranking: str = "mean_difference",
) -> None:
    """Probes of one concept: F1 0.5 + 0.1 · (place of k) + plus, all units 0.72 + plus, permuted 0.45, random units 0.4."""
    given = f1 or {k: 0.5 + 0.1 * place + plus for place, k in enumerate(ks)} | {0: 0.72 + plus}
    rows = []
    enough = None
    for k, value in given.items():
        base = {
            "probe_id": str(uuid.uuid4()), "sae_id": sae, "unit_kind": kind, "site": site, "concept": concept,
            "ranking": ranking if k else "all", "k": k, "units": list(range(1, k + 1)), "coefficients": [1.0] * k, "n": 120,
        }  # fmt: skip
        for metric, own in METRICS.items():
            found = value if metric == "F1" else own
            bounds = {"metric": metric, "value": found, "ci_low": found - 0.03, "ci_high": found + 0.02}
            rows.append(base | bounds | {"null_value": 0.45, "null_kind": PERMUTED})
            if k:
                rows.append(base | bounds | {"null_value": 0.4, "null_kind": RANDOM})
        if k and enough is None and value >= 0.95 * given.get(0, 2.0):
            enough = k
            rows.append(base | {"metric": "sparsity", "value": float(k)})
    _insert(run, "sparse_probes", rows)


def plant_description(
    run: Run,
    kind: str,
    unit: int,
    text: str,
    scores: Mapping[str, tuple[float, float]],
    *,
    sae: str | None = None,
    describer: str = "planted",
) -> str:
    """One description; scores: metric → (value, that of another unit's description). Gives its id."""
    of = str(uuid.uuid4())
    row = {
        "description_id": of, "sae_id": sae, "unit_kind": kind, "layer": 0, "block": None if sae else "mlp", "unit": unit,
        "text": text, "describer": describer, "prompt": "documents: [0]\n…",
    }  # fmt: skip
    _insert(run, "descriptions", [row])
    rows = []
    for metric, (value, other) in scores.items():
        base = {
            "description_id": of, "metric": metric, "value": value, "ci_low": value - 0.1, "ci_high": min(value + 0.05, 1.0),
            "n": 20, "scorer": describer,
        }  # fmt: skip
        if metric != "causal":
            rows.append(base | {"null_value": 0.5, "null_kind": "chance"})
        rows.append(base | {"null_value": other, "null_kind": "another unit's description"})
    _insert(run, "description_scores", rows, of_run=False)
    return of


def _insert(run: Run, table: str, rows: Sequence[Mapping[str, Any]], *, of_run: bool = True) -> None:
    if not rows:
        return
    listed = [({"run_id": run.run_id} if of_run else {}) | dict(row) for row in rows]
    cursor = run.store.cursor()
    cursor.register("planted_concept_rows", pa.Table.from_pylist(listed))
    cursor.execute(f'INSERT INTO "{table}" BY NAME SELECT * FROM planted_concept_rows')
    cursor.unregister("planted_concept_rows")
