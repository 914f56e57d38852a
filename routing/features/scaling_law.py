"""The law of how what an autoencoder leaves falls with its size and its active latents, fitted in logarithms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

# Law → its parameters. Each later one is what is left of the first with fewer of them.
LAWS: Mapping[str, tuple[str, ...]] = {
    "full": ("alpha", "beta_k", "beta_n", "gamma", "zeta", "eta"),
    "n_and_k": ("alpha", "beta_k", "beta_n"),
    "n": ("alpha", "beta_n"),
    "k": ("alpha", "beta_k"),
}
FORMULAS = {
    "full": "exp(α + β_k ln k + β_n ln n + γ ln k ln n) + exp(ζ + η ln k)",
    "n_and_k": "exp(α + β_k ln k + β_n ln n)",
    "n": "exp(α + β_n ln n)",
    "k": "exp(α + β_k ln k)",
}
# Law → sizes and sparsities that must differ for its parameters to be told apart.
NEEDS = {"full": (3, 3), "n_and_k": (2, 2), "n": (2, 1), "k": (1, 2)}
SAME = 0.05  # sparsities within 5 % count as one
_STARTS, _FEW_STARTS = 12, 3
_LEVEL = 0.95


@dataclass(frozen=True)
class Law:
    """A fitted law.

    Attributes:
        kind: of `LAWS`.
        values: its parameters, in order.
        low, high: 95 % bounds from the curvature of the fit; NaN where there are as many points as parameters.
    """

    kind: str
    values: tuple[float, ...]
    low: tuple[float, ...] = field(default=())
    high: tuple[float, ...] = field(default=())

    def predict(self, n: Floats, k: Floats) -> Floats:
        """What an autoencoder of n latents, k of them active, leaves."""
        found: Floats = np.exp(_log_law(self.kind, np.array(self.values), np.log(n), np.log(k)))
        return found


def distinct(values: Floats) -> int:
    """How many values differ by more than 5 %.

    Example:
        >>> distinct(np.array([16.0, 16.1, 32.0]))
        2
    """
    logs = np.sort(np.log(values))
    return 1 + int((np.diff(logs) > SAME).sum())


def possible_laws(n: Floats, k: Floats) -> list[str]:
    """Laws that so many points can tell, the fullest first."""
    there = distinct(n), distinct(k)
    return [
        kind
        for kind, names in LAWS.items()
        if len(n) >= len(names) and there[0] >= NEEDS[kind][0] and there[1] >= NEEDS[kind][1]
    ]


def fit_law(kind: str, n: Floats, k: Floats, loss: Floats, *, starts: int = _STARTS, seed: int = 0) -> Law:
    """Fit a law by least squares of ln loss.

    The full law is fitted from several starts, with logarithms taken about their means so that its parameters do not hide
    each other; the best is kept.

    Args:
        kind: of `LAWS`.
        n: latents; k: active latents; loss: what is left, over 0.
        starts: of the full law.
        seed: of the starts.

    Example:
        >>> n, k = np.array([256.0, 1024.0, 256.0, 1024.0]), np.array([8.0, 8.0, 32.0, 32.0])
        >>> law = fit_law("n_and_k", n, k, 2 * n**-0.25 * k**-0.5)
        >>> [round(v, 3) for v in law.values]
        [0.693, -0.5, -0.25]
    """
    from scipy.optimize import least_squares
    from scipy.stats import t as student

    log_n, log_k, target = np.log(n), np.log(k), np.log(loss)
    about_n, about_k = float(log_n.mean()), float(log_k.mean())
    centred_n, centred_k = log_n - about_n, log_k - about_k

    def residual(parameters: Floats) -> Floats:
        difference: Floats = _log_law(kind, parameters, centred_n, centred_k) - target
        return difference

    fits = [
        least_squares(residual, start, method="trf", x_scale="jac", max_nfev=4000, ftol=1e-15, xtol=1e-15, gtol=1e-15)
        for start in _starts(kind, centred_n, centred_k, target, starts, seed)
    ]
    best = min(fits, key=lambda found: found.cost)
    change = _uncentring(kind, about_n, about_k)
    values = change @ best.x
    free = len(target) - len(values)
    if free > 0:
        covariance = change @ np.linalg.pinv(best.jac.T @ best.jac) @ change.T * (2 * best.cost / free)
        half = float(student.ppf((1 + _LEVEL) / 2, free)) * np.sqrt(np.clip(np.diag(covariance), 0, None))
    else:
        half = np.full(len(values), np.nan)
    return Law(kind, *(tuple(map(float, numbers)) for numbers in (values, values - half, values + half)))


def left_out_error(kind: str, n: Floats, k: Floats, loss: Floats) -> tuple[float, float] | None:
    """Root mean square of ln(predicted ÷ measured), each point predicted from a fit to the others; beside the others' mean.

    None where the others are too few for the law.
    """
    errors, plain = [], []
    for point in range(len(n)):
        others = np.arange(len(n)) != point
        if kind not in possible_laws(n[others], k[others]):
            return None
        law = fit_law(kind, n[others], k[others], loss[others], starts=_FEW_STARTS)
        predicted = law.predict(n[point : point + 1], k[point : point + 1])[0]
        errors.append(np.log(predicted / loss[point]))
        plain.append(np.log(loss[others]).mean() - np.log(loss[point]))
    return float(np.sqrt(np.mean(np.square(errors)))), float(np.sqrt(np.mean(np.square(plain))))


def _log_law(kind: str, parameters: Floats, log_n: Floats, log_k: Floats) -> Floats:
    named = dict(zip(LAWS[kind], parameters, strict=True))
    first = named["alpha"] + named.get("beta_k", 0.0) * log_k + named.get("beta_n", 0.0) * log_n
    if kind != "full":
        return np.asarray(first)
    first = first + named["gamma"] * log_k * log_n
    found: Floats = np.logaddexp(first, named["zeta"] + named["eta"] * log_k)
    return found


def _starts(kind: str, log_n: Floats, log_k: Floats, target: Floats, count: int, seed: int) -> Sequence[Floats]:
    """Where to begin: the law without an irreducible part, and with one of several sizes under the smallest loss."""
    columns = {"alpha": np.ones_like(log_n), "beta_k": log_k, "beta_n": log_n, "gamma": log_n * log_k}
    names = [name for name in LAWS[kind] if name in columns]
    straight = np.linalg.lstsq(np.stack([columns[name] for name in names], 1), target, rcond=None)[0]
    if kind != "full":
        return [straight]
    random = np.random.default_rng(seed)
    starts = []
    for share in np.linspace(0.02, 0.95, count):
        floor = np.log(share) + float(target.min())
        reduced = np.log(np.maximum(np.exp(target) - np.exp(floor), 1e-3 * np.exp(target)))
        own = np.linalg.lstsq(np.stack([columns[name] for name in names], 1), reduced, rcond=None)[0]
        starts.append(np.r_[own, floor, random.normal(0, 0.3)])
    return starts


def _uncentring(kind: str, about_n: float, about_k: float) -> Floats:
    """The matrix that takes parameters of logarithms about their means to those of plain logarithms."""
    names = LAWS[kind]
    change = np.eye(len(names))
    at = {name: number for number, name in enumerate(names)}
    moved = {
        ("alpha", "beta_k"): -about_k, ("alpha", "beta_n"): -about_n, ("alpha", "gamma"): about_k * about_n,
        ("beta_k", "gamma"): -about_n, ("beta_n", "gamma"): -about_k, ("zeta", "eta"): -about_k,
    }  # fmt: skip
    for (into, by), amount in moved.items():
        if into in at and by in at:
            change[at[into], at[by]] = amount
    return change
