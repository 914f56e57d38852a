"""Latents joined to experts, planted row by row on a run by plain SQL: nothing here comes from moescope's own measuring.

Test folders load this file by its path, as `planted.py`.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

import pyarrow as pa

from moescope.store.run import Run

SAE_ID = str(uuid.UUID(int=0x5AE << 96))
NULL_KIND = "mean size along decoder rows of latents of nearest frequency"


def sets(layer: int = 1) -> dict[str, dict[str, Any]]:
    """Rows of `saes`: an autoencoder, a layer's neurons, and the same rotated."""
    place = {"site": f"blocks.{layer}.mlp.hook_in", "target_site": f"blocks.{layer}.hook_mlp_out", "d_in": 8}
    made = {
        "planted writers": {"site": f"blocks.{layer}.hook_mlp_out", "architecture": "topk", "d_sae": 12, "d_in": 8},
        f"neurons of layer {layer}": {**place, "architecture": "expert_neurons", "d_sae": 48},
        f"rotated neurons (0) of layer {layer}": {**place, "architecture": "rotated_expert_neurons", "d_sae": 48},
    }
    return {
        name: {**row, "name": name, "sae_id": SAE_ID if n == 0 else str(uuid.UUID(int=(0x5AE0 + n) << 96)),
               "settings": json.dumps({"least": 0.05}), "created_at": "2020-01-01 00:00:00" if n == 0 else None}
        for n, (name, row) in enumerate(made.items())
    }  # fmt: skip


def pairs(layer: int, n_experts: int, features: int = 6) -> list[dict[str, Any]]:
    """Rows of `feature_experts`: latent f is written by expert f modulo E, with 1 + f, and moves expert f + 1 of the layer behind."""
    rows: list[dict[str, Any]] = []

    def row(feature: int, at: int, expert: int | None, metric: str, value: float, unit: str, **more: Any) -> None:
        bounds = {"ci_low": value - 0.1, "ci_high": value + 0.1, "null_value": 0.2, "null_kind": NULL_KIND}
        rows.append(
            {"feature": feature, "layer": at, "block": "mlp", "expert": expert, "metric": metric, "value": value, **bounds,
             "n": 40 + feature, "unit": unit, **more}
        )  # fmt: skip

    for feature in range(features):
        for expert in range(n_experts):
            mine = expert == feature % n_experts
            along = 1.0 + feature if mine else 0.01 * expert
            row(feature, layer, expert, "writes", along, "length along the decoder")
            row(feature, layer, expert, "writes_excess", along, "length along the decoder")
            row(feature, layer, expert, "writes_share", along / (1 + feature), "share")
            row(feature, layer, expert, "writes_excess_p", 1 / 65 if mine else 0.5, "p", ci_low=None, ci_high=None)
            moved = 0.5 + feature if expert == (feature + 1) % n_experts else -0.1
            row(feature, layer + 1, expert, "gates_logit", moved, "logits")
            row(feature, layer + 1, expert, "gates_lift", 1 + max(moved, 0), "ratio")
            row(feature, layer + 1, expert, "gates_weights", moved / 2, "logits per unit of activation")
    control = {"null_value": 0.05, "null_kind": "matched experts"}
    share = "share of its mean activation"
    row(2, layer, None, "ablation_drop", 0.9, share, **control)
    row(2, layer, None, "ablation_drop_excess", 0.85, share, **(control | {"null_value": 0.0}))
    for drop in (0.04, 0.06):
        row(
            2,
            layer,
            None,
            "ablation_drop_control",
            drop,
            share,
            ci_low=None,
            ci_high=None,
            **(control | {"null_value": None}),
        )
    row(
        2,
        layer,
        2 % n_experts,
        "ablated_writer",
        1.0,
        "rank",
        ci_low=None,
        ci_high=None,
        null_value=None,
        null_kind=None,
    )
    return rows


def measures(layer: int, n_experts: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of `sae_measures` by the name of their autoencoder."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sets(layer)}

    def row(
        name: str, metric: str, condition: str, kind: str, group: str, value: float, unit: str, **more: Any
    ) -> None:
        found[name].append(
            {"metric": metric, "condition": condition, "group_kind": kind, "group_value": group, "value": value, "n": 100,
             "unit": unit, "ci_low": value - 0.05, "ci_high": value + 0.05, **more}
        )  # fmt: skip

    main, neurons, rotated = sets(layer)
    none = {"ci_low": None, "ci_high": None}
    for condition, value in (("sae", 0.6), ("permuted latents", 0.0)):
        row(main, "gates_spearman", condition, "layer", str(layer + 1), value, "correlation")
    at = str(layer)
    row(neurons, "routing_spearman", "expected_l0", "layer", at, 0.3, "correlation")
    row(neurons, "routing_spearman", "counted_l0", "layer", at, 0.4, "correlation")
    row(neurons, "routing_spearman", "random", "layer", at, 0.0, "correlation", **none)
    row(neurons, "routing_recall", "expected_l0", "layer", at, 0.5, "share")
    row(neurons, "routing_recall", "random", "layer", at, 2 / n_experts, "share", **none)
    row(neurons, "l0_spearman", "expected_l0", "layer", at, 0.9, "correlation")
    row(neurons, "l0_chosen", "counted_l0", "layer", at, 3.0, "neurons")
    row(neurons, "l0_not_chosen", "counted_l0", "layer", at, 4.0, "neurons")
    for expert in range(n_experts):
        row(neurons, "l0", "counted_l0", "expert", str(expert), 3.0 + 0.1 * expert, "neurons")
    row(neurons, "swap_delta_nll", "expected_l0", "layer", at, 0.7, "nats")
    row(neurons, "swap_delta_nll", "random", "layer", at, 1.5, "nats")
    for name, base in ((main, 0.6), (neurons, 0.4), (rotated, 0.2)):
        for feature in range(6):
            for metric in ("predicted_by_token", "predicted_by_label"):
                row(name, metric, "sae", "feature", str(feature), base + 0.01 * feature, "correlation")
                row(name, metric, "shuffled", "feature", str(feature), 0.01, "correlation", **none)
    return found


def plant_feature_experts(run: Run, *, layer: int = 1, n_experts: int = 6) -> str:
    """Plant an autoencoder at a layer's output with its experts, the layer's neurons and their rotation; gives its id."""
    made = sets(layer)
    held = {str(sae) for (sae,) in run.store.fetch("SELECT sae_id FROM saes")}
    _insert(run, "saes", [row for row in made.values() if row["sae_id"] not in held], owned=False)
    _insert(run, "feature_experts", [{"sae_id": SAE_ID, **row} for row in pairs(layer, n_experts)])
    for name, rows in measures(layer, n_experts).items():
        _insert(run, "sae_measures", [{"sae_id": made[name]["sae_id"], **row} for row in rows])
    tokens = run.rows("tokens")
    for number, row in enumerate(made.values()):
        latents = [
            {"sae_id": row["sae_id"], "feature": f, "active": 25, "tokens": tokens, "documents": 4, "mean": 1.0, "maximum": 2.0,
             "decoder_norm": 1.0}
            for f in range(6)
        ]  # fmt: skip
        _insert(run, "features", latents)
        lifts = [
            {
                "sae_id": row["sae_id"],
                "feature": f,
                "label": label,
                "active": 10,
                "tokens": 50,
                "lift": lift,
                "p": p,
                "q": p,
            }
            for f in range(6)
            for label, lift, p in (("a", 3.0 - number, 0.01 if f < 3 - number else 0.6), ("b", 0.5, 0.7))
        ]
        _insert(run, "feature_labels", lifts)
    return SAE_ID


def _insert(run: Run, table: str, rows: list[dict[str, Any]], *, owned: bool = True) -> None:
    if not rows:
        return
    cursor = run.store.cursor()
    cursor.register("planted_pairs", pa.Table.from_pylist(rows))
    if owned:
        cursor.execute(f'INSERT INTO "{table}" BY NAME SELECT ?::UUID AS run_id, * FROM planted_pairs', [run.run_id])
    else:
        cursor.execute(f'INSERT INTO "{table}" BY NAME SELECT * FROM planted_pairs')
    cursor.unregister("planted_pairs")
