"""How often two experts would be chosen together if a decision were k experts drawn by load alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_ROUNDS = 60
_HALVINGS = 20
_CLOSE = 1e-8


def chance_pairs(share: Floats, k: int) -> Floats:
    """Probability that two experts are chosen by the same token, when nothing but load and k decides.

    Of all ways to draw k different experts with these loads the one of largest entropy: independent draws with probabilities
    p, given that exactly k come out (conditional Poisson sampling; Hájek 1964, Chen, Dempster & Liu 1994). With equal loads
    it is k(k − 1) ÷ (E(E − 1)). The plain product of two loads is not that chance: experts of one decision differ, so they
    shut each other out.

    Args:
        share: [expert] share of tokens that choose it; sums to k.
        k: experts of a decision.

    Returns:
        [expert, expert], symmetric, rows summing to (k − 1) · share off the diagonal; the diagonal is 0.

    Example:
        >>> bool(np.isclose(chance_pairs(np.full(4, 0.5), 2)[0, 1], 1 / 6))
        True
    """
    always = share > 1 - 1e-12
    free = np.flatnonzero(~always & (share > 0))
    together = np.zeros((len(share), len(share)))
    together[np.ix_(always, always)] = 1.0
    together[always] = np.where(always[:, None], share[None, :], together)[always]
    together[:, always] = together[always].T
    open_slots = k - int(always.sum())
    if len(free) and open_slots > 1:
        together[np.ix_(free, free)] = _drawn_together(share[free], open_slots)
    np.fill_diagonal(together, 0.0)
    return together


def _drawn_together(share: Floats, k: int) -> Floats:
    """Joint probabilities of experts that are neither always nor never chosen.

    The loads are the gradient, and the covariances the Hessian, of a convex function of the log-odds of the independent
    draws, so Newton's steps find the log-odds, halved where they overshoot.
    """
    odds = np.log(share / (1 - share))
    reached, together = _drawn_at(odds, k)
    for _ in range(_ROUNDS):
        short = share - reached
        if np.abs(short).max() < _CLOSE:
            break
        covariance = together - np.outer(reached, reached)
        np.fill_diagonal(covariance, reached * (1 - reached))
        # Adding the same to all log-odds changes nothing: that direction is taken out.
        step = np.linalg.solve(covariance + 1 / len(share) + 1e-13 * np.eye(len(share)), short)
        for _ in range(_HALVINGS):
            tried, pairs = _drawn_at(odds + step, k)
            if np.abs(share - tried).max() < np.abs(short).max():
                break
            step = step / 2
        else:
            break
        odds, reached, together = odds + step, tried, pairs
    return np.clip(together, 0.0, np.minimum(share[:, None], share[None, :]))


def _drawn_at(odds: Floats, k: int) -> tuple[Floats, Floats]:
    """Probability of each expert, and of each pair, among independent draws of which exactly k come out.

    By the characteristic function of the number of draws: it has experts + 1 values, so that many angles give it exactly,
    and an odd number of angles never meets the one at which a factor can vanish.
    """
    p = 1 / (1 + np.exp(-np.clip(odds, -40, 40)))
    angles = 2 * np.pi * np.arange(len(p) + 1 + len(p) % 2) / (len(p) + 1 + len(p) % 2)
    turn = np.exp(1j * angles)[:, None]
    factor = 1 - p + p * turn
    logs = np.log(factor).sum(1)
    weight = np.exp(logs - logs.real.max()) * turn[:, 0] ** (-float(k))
    weight /= weight.sum()
    chosen = p * turn / factor
    return (weight[:, None] * chosen).sum(0).real, ((chosen * weight[:, None]).T @ chosen).real
