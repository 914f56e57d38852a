"""How far router weights alone tell what routers do where latents are active."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.statistics import document_weights
from moescope.sae.experts.gate_rows import by_weights, difference, measured
from moescope.sae.experts.pair_rows import Setting
from moescope.sae.experts.subject import Router

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_PERMUTATIONS, _DRAWS = 100, 200


def pearson(one: Floats, other: Floats) -> float:
    """Correlation of two lists of numbers; NaN where one of them is constant.

    Example:
        >>> pearson(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
        1.0
    """
    a, b = one - one.mean(), other - other.mean()
    size = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / size) if size > 0 else float("nan")


def spearman(one: Floats, other: Floats) -> float:
    """Correlation of ranks, ties sharing theirs.

    Example:
        >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 8.0, 27.0]))
        1.0
    """
    from scipy.stats import rankdata

    return pearson(rankdata(one), rankdata(other))


def agreement_rows(setting: Setting, at: Router, sample: Ints) -> list[dict[str, Any]]:
    """Rows of `sae_measures`: correlation of `gates_weights` with `gates_logit` over pairs of latent and expert.

    Over the sampled latents. Resampling documents adds noise to one side, which lowers every resampled correlation: the
    interval is the value ± 1.96 of their standard deviation, and no percentiles. The control permutes latents, its interval the
    percentiles.
    """
    weights = by_weights(setting, at)
    pairs = setting.groups.gates[at]
    if weights is None or len(sample) < 3 or pairs.sampled is None:
        return []
    logit = measured(setting.sums, at)[0]
    random = np.random.default_rng(setting.seed)
    again = _resampled(setting, at, sample)
    rows: list[dict[str, Any]] = []
    for metric, correlation in (("gates_spearman", spearman), ("gates_pearson", pearson)):
        value = correlation(weights[:, sample].ravel(), logit[:, sample].ravel())
        drawn = [
            correlation(weights[:, random.permutation(sample)].ravel(), logit[:, sample].ravel())
            for _ in range(_PERMUTATIONS)
        ]
        spread = (
            1.96 * np.std([correlation(weights[:, sample].ravel(), one.ravel()) for one in again]) if again else np.nan
        )
        bounds = max(-1.0, value - spread), min(1.0, value + spread)
        chance = tuple(np.nanquantile(drawn, [0.025, 0.975]))
        for condition, number, (low, high) in (
            ("sae", value, bounds if again else (np.nan, np.nan)),
            ("permuted latents", float(np.mean(drawn)), chance),
        ):
            if np.isfinite(number):
                rows.append(
                    {
                        "sae_id": setting.sae_id,
                        "run_id": setting.run_id,
                        "metric": metric,
                        "condition": condition,
                        "group_kind": "layer",
                        "group_value": str(at[0]) if at[1] == "mlp" else f"{at[0]} {at[1]}",
                        "value": number,
                        "ci_low": float(low) if np.isfinite(low) else None,
                        "ci_high": float(high) if np.isfinite(high) else None,
                        "n": int(weights[:, sample].size),
                        "unit": "correlation",
                    }
                )
    return rows


def _resampled(setting: Setting, at: Router, sample: Ints) -> list[Floats]:
    """[choice, sampled latent] `gates_logit` of each resample of documents; 0 where a latent is active in none of it."""
    pairs = setting.groups.gates[at]
    assert pairs.sampled is not None
    assert pairs.all_logits is not None
    groups = len(pairs.sampled)
    if groups < 2:
        return []
    found = []
    for weights in document_weights(groups, draws=_DRAWS, seed=setting.seed).astype(np.float64):
        active = weights @ setting.groups.active[:, sample]
        with np.errstate(divide="ignore", invalid="ignore"):
            logit = difference(
                np.tensordot(weights, pairs.sampled, axes=1).T,
                (weights @ pairs.all_logits)[:, None],
                active[None],
                np.array(float(weights @ setting.groups.rows)),
            )
        found.append(np.nan_to_num(logit))
    return found
