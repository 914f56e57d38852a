"""A compiled loop that deals decisions out again; imported inside functions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

_TRIES = 1000


@njit(cache=True, nogil=True)
def part_repeats(dealt: NDArray[Any], seed: int) -> None:
    """Swap experts between tokens, in place, until no token holds one twice (or no swap is found in 1,000 tries)."""
    np.random.seed(seed)  # noqa: NPY002  compiled code has no other generator to seed
    tokens, width = dealt.shape
    for token in range(tokens):
        for slot in range(1, width):
            for _ in range(_TRIES):
                own = dealt[token, slot]
                repeated = False
                for before in range(width):
                    repeated |= before != slot and dealt[token, before] == own
                if not repeated:
                    break
                other, place = np.random.randint(tokens), np.random.randint(width)  # noqa: NPY002  compiled code has no other generator to seed
                offered = dealt[other, place]
                fits = other != token
                for i in range(width):
                    fits &= dealt[token, i] != offered and dealt[other, i] != own
                if fits:
                    dealt[token, slot], dealt[other, place] = offered, own
