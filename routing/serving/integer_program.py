"""ExFlow's integer program: the placement of fewest crossings, exactly, where the run is small enough."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moescope.routing.serving.devices import Devices, slots

Floats = NDArray[np.float64]


def solve(
    joints: Sequence[Floats], experts: Sequence[int], devices: int, *, seconds: float
) -> tuple[list[Devices], bool] | None:
    """[layer][expert] device of fewest crossings and whether that is proved, or None where none was found in time.

    Binary x[layer, expert, device], equally many experts on each device of a layer; a pair (i, j) of consecutive layers crosses
    by c ≥ x[l, i, d] − x[l + 1, j, d] for every device d; Σ pairs · c is minimised by `scipy.optimize.milp` (HiGHS).

    Args:
        joints: for each step, [expert, next layer's expert] pairs.
        experts: for each layer, how many there are.
        devices: how many devices there are.
        seconds: time limit.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    first = np.concatenate([[0], np.cumsum(np.asarray(experts) * devices)])
    pairs = [np.nonzero(joint) for joint in joints]
    crossings = sum(len(i) for i, _ in pairs)
    size = int(first[-1]) + crossings
    cost = np.zeros(size)
    cost[first[-1] :] = np.concatenate([joint[at] for joint, at in zip(joints, pairs, strict=True)] or [np.zeros(0)])
    lower, upper = np.zeros(size), np.ones(size)
    if all(number % devices == 0 for number in experts):
        lower[0] = 1.0  # devices are alike: the first expert of the first layer lies on the first
    once, room = _once(first, devices, size), _room(first, experts, devices, size)
    per_device = np.concatenate([np.bincount(slots(n, devices), minlength=devices) for n in experts])
    constraints = [LinearConstraint(once, 1, 1), LinearConstraint(room, per_device, per_device)]
    if crossings:
        constraints.append(LinearConstraint(_crossing(first, pairs, devices, size), 0, np.inf))
    integrality = np.zeros(size)
    integrality[: first[-1]] = 1
    found = milp(
        cost, integrality=integrality, bounds=Bounds(lower, upper), constraints=constraints,
        options={"time_limit": seconds},
    )  # fmt: skip
    if found.x is None:
        return None
    chosen = found.x[: first[-1]]
    placements = [
        chosen[start:stop].reshape(-1, devices).argmax(1).astype(np.int64) for start, stop in itertools.pairwise(first)
    ]
    return placements, found.status == 0


def _sparse(values: NDArray[np.float64], rows: NDArray[np.int64], columns: NDArray[np.int64], size: int) -> object:
    from scipy.sparse import csr_array

    return csr_array((values, (rows, columns)), shape=(int(rows.max()) + 1, size))


def _once(first: NDArray[np.int64], devices: int, size: int) -> object:
    """Every expert lies on one device."""
    columns = np.arange(first[-1])
    return _sparse(np.ones(len(columns)), columns // devices, columns, size)


def _room(first: NDArray[np.int64], experts: Sequence[int], devices: int, size: int) -> object:
    """Every device of a layer holds its number of experts."""
    columns = np.arange(first[-1])
    layer = np.repeat(np.arange(len(experts)), np.asarray(experts) * devices)
    return _sparse(np.ones(len(columns)), layer * devices + columns % devices, columns, size)


def _crossing(
    first: NDArray[np.int64], pairs: Sequence[tuple[NDArray[np.int64], ...]], devices: int, size: int
) -> object:
    """c − x[l, i, d] + x[l + 1, j, d] ≥ 0 for every pair and device."""
    here = np.concatenate([first[step] + i * devices for step, (i, _) in enumerate(pairs)])
    there = np.concatenate([first[step + 1] + j * devices for step, (_, j) in enumerate(pairs)])
    device = np.tile(np.arange(devices), len(here))
    crossing = np.repeat(first[-1] + np.arange(len(here)), devices)
    row = np.arange(len(device))
    columns = np.concatenate([crossing, np.repeat(here, devices) + device, np.repeat(there, devices) + device])
    ones = np.ones(len(row))
    return _sparse(np.concatenate([ones, -ones, ones]), np.tile(row, 3), columns, size)
