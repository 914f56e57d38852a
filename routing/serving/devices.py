"""Placements: which device holds each expert of a layer, equally many on each."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Devices = NDArray[np.int64]


def slots(experts: int, devices: int) -> Devices:
    """[slot] the device of each slot: as many slots as experts, equally many on each device (the first may have one more).

    Example:
        >>> slots(5, 2).tolist()
        [0, 0, 0, 1, 1]
    """
    share, rest = divmod(experts, devices)
    return np.repeat(np.arange(devices), [share + (device < rest) for device in range(devices)])


def contiguous(experts: int, devices: int) -> Devices:
    """[expert] device when experts are dealt out in order of their ids, the default of serving engines."""
    return slots(experts, devices)


def at_random(experts: int, devices: int, generator: np.random.Generator) -> Devices:
    """[expert] device, drawn at random."""
    return generator.permutation(slots(experts, devices))


def device_loads(loads: NDArray[Any], placement: Devices) -> NDArray[np.float64]:
    """[batch, device] load of devices, from [batch, expert] loads."""
    held = np.zeros((len(placement), int(placement.max()) + 1))
    held[np.arange(len(placement)), placement] = 1.0
    total: NDArray[np.float64] = loads @ held
    return total
