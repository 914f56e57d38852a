"""Training students on pairs of input and output, the rate chosen on a validation part, and their errors on the test part."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import nn

from moescope.core.errors import RunError

_LOOK = 20  # steps between looks at the loss
_RIDGES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)

Make = Callable[[int, torch.Tensor], nn.Module]  # (seed, standardised training inputs) → student


@dataclass(frozen=True)
class Parts:
    """Pairs in three parts, standardised by the training part: components of x by their spread, y by one number.

    Students see these; a standardisation is an affine map, which their first and last weights could hold as well.

    Attributes:
        train, validation, test: (x, y), y about the mean of the training part.
    """

    train: tuple[torch.Tensor, torch.Tensor]
    validation: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]

    @classmethod
    def of(cls, *parts: tuple[torch.Tensor, torch.Tensor]) -> Parts:
        """From raw pairs of train, validation and test."""
        x, y = parts[0]
        mean, spread = x.mean(0), x.std(0).clamp(min=1e-6 * float(x.std()) + 1e-12)
        centre = y.mean(0)
        scale = float((y - centre).square().mean().sqrt().clamp(min=1e-12))
        made = [((a - mean) / spread, (b - centre) / scale) for a, b in parts]
        return cls(made[0], made[1], made[2])


@dataclass(frozen=True)
class Fitted:
    """One kind of student, trained.

    Attributes:
        modules: one for each seed, of the best rate; empty for closed forms.
        errors: [seed, vector] squared error on the test part.
        rate: the rate chosen; None for closed forms.
        settings: how it was trained: validation error by rate, rates that gave no finite loss.
    """

    modules: list[nn.Module]
    errors: NDArray[np.float64]
    rate: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def fit(
    make: Make,
    parts: Parts,
    *,
    rates: Sequence[float],
    steps: int,
    batch: int,
    seeds: Sequence[int],
    tick: Callable[[int], None] = lambda _: None,
) -> Fitted:
    """Train with Adam and a cosine schedule at every rate; keep the rate with the least error on the validation part.

    Args:
        make: a fresh student.
        parts: what to learn from.
        rates: learning rates; all are tried with the first seed, the best is used for the others.
        steps, batch: steps of training, and vectors a step.
        seeds: of weights and order of vectors; one student each.
        tick: told vectors after every step.

    Raises:
        RunError: no rate gave a finite loss.
    """
    tried: dict[float, nn.Module] = {}
    errors: dict[float, float] = {}
    for rate in rates:
        student = _trained(make, parts, rate, steps, batch, seeds[0], tick)
        if student is not None:
            tried[rate] = student
            errors[rate] = float(_errors(student, parts.validation).mean())
    errors = {rate: error for rate, error in errors.items() if math.isfinite(error)}
    if not errors:
        raise RunError(
            "a student's loss was not finite at any learning rate",
            found=", ".join(f"{rate:g}" for rate in rates),
            fix="try smaller ones: lrs=(1e-4,)",
        )
    best = min(errors, key=lambda rate: errors[rate])
    modules = [tried[best]]
    for seed in seeds[1:]:
        student = _trained(make, parts, best, steps, batch, seed, tick)
        if student is None:
            raise RunError(f"a student's loss was not finite at rate {best:g}, seed {seed}", fix="try smaller rates")
        modules.append(student)
    test = np.stack([_errors(module, parts.test) for module in modules])
    return Fitted(
        modules, test, best,
        {
            "rate": best, "validation_mse": {f"{rate:g}": error for rate, error in errors.items()},
            "not_finite": [rate for rate in rates if rate not in errors],
        },
    )  # fmt: skip


def linear_map(parts: Parts) -> Fitted:
    """The best affine map in closed form, in float64; of some amounts of ridge the one with the least validation error."""
    x, y = (t.double() for t in parts.train)
    gram, cross = x.T @ x, x.T @ y
    trace = float(gram.diagonal().mean())
    best: tuple[float, float, torch.Tensor] | None = None
    for ridge in _RIDGES:
        damped = gram + torch.eye(len(gram), dtype=gram.dtype) * (ridge * trace)
        weights = torch.linalg.lstsq(damped, cross, driver="gelsd").solution
        error = float(_squared(parts.validation[0].double() @ weights, parts.validation[1]).mean())
        if best is None or error < best[1]:
            best = ridge, error, weights
    assert best is not None
    found = _squared(parts.test[0].double() @ best[2], parts.test[1]).numpy()
    return Fitted([], found[None], None, {"ridge": best[0]})


def mean_output(parts: Parts) -> Fitted:
    """The mean output of the training part, whatever the input."""
    return Fitted([], parts.test[1].double().square().sum(1).numpy()[None], None, {})


def spread_of(parts: Parts) -> NDArray[np.float64]:
    """[vector] squared distance of each output of the test part from their mean."""
    y = parts.test[1].double()
    found: NDArray[np.float64] = (y - y.mean(0)).square().sum(1).numpy()
    return found


def _trained(
    make: Make, parts: Parts, rate: float, steps: int, batch: int, seed: int, tick: Callable[[int], None]
) -> nn.Module | None:
    """One student; None where its loss stopped being finite."""
    x, y = parts.train
    order = torch.Generator().manual_seed(seed)
    student = make(seed, x[torch.randperm(len(x), generator=order)])
    optimizer = torch.optim.Adam(student.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    size = min(batch, len(x))
    with torch.enable_grad():
        for step in range(steps):
            chosen = torch.randint(len(x), (size,), generator=order)
            loss = (student(x[chosen]) - y[chosen]).square().sum(1).mean()
            if step % _LOOK == 0 and not bool(loss.isfinite()):
                return None
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            tick(size)
    finite = all(bool(p.isfinite().all()) for p in student.parameters())
    return student.eval().requires_grad_(False) if finite else None


@torch.no_grad()
def _errors(student: nn.Module, part: tuple[torch.Tensor, torch.Tensor]) -> NDArray[np.float64]:
    pieces = zip(torch.split(part[0], 4096), torch.split(part[1], 4096), strict=True)
    found: NDArray[np.float64] = torch.cat([_squared(student(x), y) for x, y in pieces]).numpy()
    return found


def _squared(guess: torch.Tensor, truth: torch.Tensor) -> Float[torch.Tensor, " vector"]:
    return (guess.double() - truth.double()).square().sum(1)
