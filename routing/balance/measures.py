"""Measures of how evenly a load is spread over experts, and what chance alone gives them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# name → (unit, smallest, largest value)
MEASURES: dict[str, tuple[str, float, float]] = {
    "CV": ("ratio", 0.0, np.inf),
    "max ÷ mean": ("ratio", 1.0, np.inf),
    "MaxVio": ("ratio", 0.0, np.inf),
    "MaxVio of a batch": ("ratio", 0.0, np.inf),
    "normalised entropy": ("share of ln E", 0.0, 1.0),
    "effective experts": ("experts", 1.0, np.inf),
    "Jain's index": ("share", 0.0, 1.0),
    "experts used": ("share of experts", 0.0, 1.0),
    "dead experts": ("share of experts", 0.0, 1.0),
    "starved experts": ("share of experts", 0.0, 1.0),
}


def load_measures(loads: NDArray[Any], *, starved: float = 0.1) -> dict[str, Floats]:
    """Every measure of `MEASURES` for loads [..., expert], but for batches; NaN where nothing was chosen.

    Args:
        loads: decisions that name each expert.
        starved: an expert is starved below this part of its fair share.

    Example:
        >>> found = load_measures(np.array([8.0, 0.0, 0.0, 0.0]))
        >>> float(found["MaxVio"]), float(found["Jain's index"]), float(found["dead experts"])
        (3.0, 0.25, 0.75)
    """
    loads = np.asarray(loads, dtype=np.float64)
    n_experts = loads.shape[-1]
    mean = loads.mean(-1)
    fair = np.where(mean > 0, mean, np.nan)
    relative = loads / fair[..., None]
    share = relative / n_experts
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(-1)
    none = np.where(mean > 0, 0.0, np.nan)
    highest = relative.max(-1)
    dead = (loads == 0).mean(-1) + none
    return {
        "CV": relative.std(-1),
        "max ÷ mean": highest,
        "MaxVio": highest - 1,
        "normalised entropy": entropy / np.log(n_experts) if n_experts > 1 else 1.0 + none,
        "effective experts": np.exp(entropy),
        "Jain's index": 1 / (n_experts * (share**2).sum(-1)),
        "experts used": 1 - dead,
        "dead experts": dead,
        "starved experts": (relative < starved).mean(-1) + none,
    }


def batch_loads(experts: NDArray[np.integer[Any]], n_experts: int, batch: int) -> Floats:
    """[batch, expert] decisions that name each expert, of whole batches of tokens in order; of all tokens if they fill none."""
    size = min(batch, len(experts))
    whole = len(experts) // size
    place = np.repeat(np.arange(whole), size)[:, None] * n_experts + experts[: whole * size]
    return np.bincount(place.ravel(), minlength=whole * n_experts).reshape(whole, n_experts).astype(np.float64)


def chance_loads(tokens: int, n_experts: int, top_k: int, *, draws: int, seed: int) -> NDArray[np.int64]:
    """[draw, expert] loads of a router that picks `top_k` of `n_experts` at random for each of `tokens`, all alike.

    Exact: experts are gone through one by one; of the tokens that still have r picks to make among the m experts left, each
    takes the next expert with probability r ÷ m.

    Example:
        >>> loads = chance_loads(1000, 8, 2, draws=3, seed=0)
        >>> loads.sum(1).tolist()
        [2000, 2000, 2000]
    """
    generator = np.random.default_rng(seed)
    waiting = np.zeros((top_k + 1, draws), np.int64)
    waiting[top_k] = tokens
    loads = np.zeros((n_experts, draws), np.int64)
    for expert in range(n_experts):
        left = n_experts - expert
        picks = np.arange(top_k + 1)[:, None]
        taken = generator.binomial(waiting, np.minimum(1.0, picks / left))
        loads[expert] = taken.sum(0)
        waiting -= taken
        waiting[:-1] += taken[1:]
    return loads.T


@lru_cache(maxsize=256)
def chance_levels(
    tokens: int, n_experts: int, top_k: int, *, starved: float, draws: int, seed: int
) -> dict[str, tuple[float, float, float]]:
    """What `load_measures` gives for a uniform random router: mean, 2.5 % and 97.5 % quantile over draws."""
    found = load_measures(chance_loads(tokens, n_experts, top_k, draws=draws, seed=seed), starved=starved)
    levels = {}
    for name, values in found.items():
        low, high = np.quantile(values, [0.025, 0.975])
        levels[name] = (float(values.mean()), float(low), float(high))
    return levels
