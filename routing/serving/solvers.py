"""Solvers for placements: by load, apart what is loaded together, together what follows each other."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moescope.routing.serving.devices import Devices, at_random, contiguous, slots

Floats = NDArray[np.float64]


def by_load(loads: Floats, devices: int) -> Devices:
    """[expert] device: the largest load first, each to the least loaded device that has a slot left.

    Args:
        loads: [expert] decisions.
        devices: how many devices there are.

    Example:
        >>> by_load(np.array([4.0, 3.0, 2.0, 1.0]), 2).tolist()
        [0, 1, 1, 0]
    """
    free = np.bincount(slots(len(loads), devices), minlength=devices)
    held = np.zeros(devices)
    placement = np.empty(len(loads), np.int64)
    for expert in np.argsort(-loads, kind="stable"):
        device = int(np.where(free > 0, held, np.inf).argmin())
        placement[expert] = device
        held[device] += loads[expert]
        free[device] -= 1
    return placement


def apart(loads: Floats, devices: int, *, until: float) -> Devices:
    """[expert] device: swaps of two experts, from `by_load`, while they lower the mean squared load of devices.

    The mean of Σ_device (Σ load)² over batches is Σ over pairs on one device of their mean product: experts that are loaded in
    the same batches cost most side by side.

    Args:
        loads: [batch, expert] decisions.
        devices: how many devices there are.
        until: `time.monotonic()` at which to stop.
    """
    product = loads.T @ loads / len(loads)
    placement = by_load(loads.mean(0), devices)
    own = np.diag(product)
    for _ in range(20 * len(own)):
        held = np.zeros((len(own), devices))
        held[np.arange(len(own)), placement] = 1.0
        together = product @ held
        beside = together[np.arange(len(own)), placement]
        moved = together[:, placement]
        change = 2 * (moved + moved.T - beside[:, None] - beside[None, :] - 2 * product) + 2 * (
            own[:, None] + own[None, :]
        )
        change[placement[:, None] == placement[None, :]] = 0.0
        i, j = np.unravel_index(int(change.argmin()), change.shape)
        if change[i, j] >= -1e-9 * max(product.max(), 1e-300) or time.monotonic() > until:
            break
        placement[i], placement[j] = placement[j], placement[i]
    return placement


def stays(joints: Sequence[Floats], placements: Sequence[Devices]) -> float:
    """How many pairs stay on their device from layer to layer.

    Args:
        joints: for each step, [expert, next layer's expert] pairs.
        placements: for each layer, [expert] device.
    """
    return float(
        sum(
            joint[here[:, None] == there[None, :]].sum()
            for joint, here, there in zip(joints, placements, placements[1:], strict=False)
        )
    )


def aligned(
    joints: Sequence[Floats], experts: Sequence[int], devices: int, *, starts: int, until: float, seed: int
) -> tuple[list[Devices], bool]:
    """[layer][expert] device so that pairs of consecutive layers share a device, and whether no single layer can be improved.

    With its neighbours fixed, a layer's best placement is a linear assignment of experts to slots, solved exactly
    (`scipy.optimize.linear_sum_assignment`); layers are solved in turn until none improves. The first start is the contiguous
    placement of all layers, the second that of the first layer with the others aligned to it one by one, the rest random ones.

    Args:
        joints: for each step, [expert, next layer's expert] pairs.
        experts: for each layer, how many there are.
        devices: how many devices there are.
        starts: how many starts are tried.
        until: `time.monotonic()` at which to stop.
        seed: of the random starts.
    """
    generator = np.random.default_rng(seed)
    best: list[Devices] = []
    best_stays, whole = -1.0, False
    for start in range(starts):
        placements = [contiguous(size, devices) for size in experts]
        if start > 1:
            placements[0] = at_random(experts[0], devices, generator)
        if start > 0:
            for layer, (joint, size) in enumerate(zip(joints, experts[1:], strict=True)):
                gain = _held(joint.T, placements[layer], devices)
                placements[layer + 1] = _assigned(gain, slots(size, devices))
        found, settled = _improved(joints, placements, devices, until)
        if found > best_stays:
            best, best_stays, whole = placements, found, settled
        if time.monotonic() > until:
            break
    return best, whole


def _improved(joints: Sequence[Floats], placements: list[Devices], devices: int, until: float) -> tuple[float, bool]:
    """Solve layer after layer, in place, until a round brings nothing; the pairs that stay, and whether it ended so."""
    value = stays(joints, placements)
    while time.monotonic() <= until:
        for layer in range(len(placements)):
            gain = np.zeros((len(placements[layer]), devices))
            if layer > 0:
                gain += _held(joints[layer - 1].T, placements[layer - 1], devices)
            if layer < len(joints):
                gain += _held(joints[layer], placements[layer + 1], devices)
            placements[layer] = _assigned(gain, slots(len(placements[layer]), devices))
        now = stays(joints, placements)
        if now <= value:
            return now, True
        value = now
    return value, False


def _held(pairs: Floats, placement: Devices, devices: int) -> Floats:
    """[expert, device] pairs of each expert with the other layer's experts on a device."""
    held = np.zeros((len(placement), devices))
    held[np.arange(len(placement)), placement] = 1.0
    gain: Floats = pairs @ held
    return gain


def _assigned(gain: Floats, slot_devices: Devices) -> Devices:
    from scipy.optimize import linear_sum_assignment

    expert, slot = linear_sum_assignment(gain[:, slot_devices], maximize=True)
    placement = np.empty(len(gain), np.int64)
    placement[expert] = slot_devices[slot]
    return placement
