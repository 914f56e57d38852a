"""Judged autoencoders planted row by row on a run, by plain SQL: nothing here comes from moescope's own judging.

Test folders load this file by its path, as `planted.py`.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa

from moescope.store.run import Run

SITE = "blocks.0.hook_mlp_out"
SIZES, SPARSITIES = (256, 1024, 4096), (8.0, 16.0, 32.0)
# α, β_k, β_n, γ, ζ, η
PLANTED = (2.0, -0.7, -0.45, 0.02, -3.2, -0.3)


def planted_law(n: float, k: float) -> float:
    """What an autoencoder of n latents, k active, leaves."""
    alpha, beta_k, beta_n, gamma, zeta, eta = PLANTED
    log_n, log_k = np.log(n), np.log(k)
    return float(np.exp(alpha + beta_k * log_k + beta_n * log_n + gamma * log_k * log_n) + np.exp(zeta + eta * log_k))


def plant_sae_measures(
    run: Run,
    *,
    sizes: Sequence[int] = SIZES,
    sparsities: Sequence[float] = SPARSITIES,
    law: Callable[[float, float], float] = planted_law,
    labels: Sequence[str] = ("a", "b"),
    live: bool = True,
    site: str = SITE,
    called: str = "judged",
    seed: int = 0,
) -> list[str]:
    """Plant a grid of autoencoders, judged on a run; gives their names, the newest last."""
    saes: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for number, (n, k) in enumerate((n, k) for k in sparsities for n in sizes):
        sae_id = str(uuid.uuid5(uuid.UUID(run.run_id), f"judged {site} {seed} {number}"))
        saes.append(
            {
                "sae_id": sae_id, "name": f"{called} {site} {seed} {n} {k:g}", "site": site, "architecture": "topk", "d_in": 32, "d_sae": n,
                "model": run.model, "trained_on": run.run_id, "created_at": datetime(2026, 1, 1) + timedelta(seconds=number),
            }
        )  # fmt: skip
        rows += [{"sae_id": sae_id, "run_id": run.run_id, **row} for row in _measures(n, k, law(n, k), labels, live)]
    _insert(run, "saes", saes)
    _insert(run, "sae_measures", rows)
    return [row["name"] for row in saes]


def _measures(n: int, k: float, fvu: float, labels: Sequence[str], live: bool) -> list[dict[str, Any]]:
    left = {
        "sae": fvu, "pca": min(0.99, 3 * fvu), "pca_topk": min(0.98, 2 * fvu), "random_decoder": 0.9, "shuffled": 1.5, "mean": 1.0,
        "zero": 1.1,
    }  # fmt: skip
    rows = [_row("fvu", name, value, "share of variance") for name, value in left.items()]
    rows += [_row("explained_variance", name, 1 - value, "share of variance") for name, value in left.items()]
    rows += [_row("l0", "sae", k, "latents"), _row("dead_share", "sae", 0.1, "share of latents", bounds=False, n=n)]
    for number, label in enumerate(labels):
        for name, auc in (("sae", 0.9), ("random_direction", 0.7), ("shuffled", 0.5)):
            rows.append(_row("probe_auc", name, auc - 0.01 * number, "AUC", group=("label", label)))
            rows.append(_row("probe_loss", name, 1 - auc, "nats", group=("label", label)))
    rows += [_row("probe_loss", name, value, "nats") for name, value in (("sae", 0.1), ("random_direction", 0.3))]
    if live:
        rows += [_row("delta_ce", name, value, "nats") for name, value in left.items()]
        rows += [_row("loss_recovered_zero", "sae", 1 - fvu / 1.1, "share of loss"), _row("ce", "base", 3.0, "nats")]
    return rows


def _row(
    metric: str, condition: str, value: float, unit: str, *, group: tuple[str, str | None] = ("all", None), bounds: bool = True,
    n: int = 1000,
) -> dict[str, Any]:  # fmt: skip
    width = 0.05 * abs(value)
    return {
        "metric": metric, "condition": condition, "group_kind": group[0], "group_value": group[1], "value": value,
        "ci_low": value - width if bounds else None, "ci_high": value + width if bounds else None, "n": n, "unit": unit,
    }  # fmt: skip


def _insert(run: Run, table: str, rows: Sequence[dict[str, Any]]) -> None:
    types = {
        "group_value": pa.string(),
        "ci_low": pa.float64(),
        "ci_high": pa.float64(),
        "created_at": pa.timestamp("us"),
    }
    arrays = {name: pa.array([row[name] for row in rows], types.get(name)) for name in rows[0]}
    cursor = run.store.cursor()
    cursor.register("planted_judged_rows", pa.table(arrays))
    cursor.execute(f'INSERT INTO "{table}" BY NAME SELECT * FROM planted_judged_rows')
    cursor.unregister("planted_judged_rows")
