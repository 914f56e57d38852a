"""Which tokens' vectors are kept: a hash of seed, sequence and position decides, and nothing else does.

So the sample is the same however a corpus is batched, resumed or shared out; a smaller share is a part of a larger one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def token_hash(
    seed: int, sequence: NDArray[np.integer] | int, position: NDArray[np.integer] | int
) -> NDArray[np.uint64]:
    """Hash of each token, uniform over 0 to 2^64 − 1.

    mix(mix(mix(seed) + sequence) + position) in arithmetic modulo 2^64, where mix is the output function of SplitMix64
    (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014):

        z = x + 0x9E3779B97F4A7C15
        z = (z ^ (z >> 30)) · 0xBF58476D1CE4E5B9
        z = (z ^ (z >> 27)) · 0x94D049BB133111EB
        mix(x) = z ^ (z >> 31)

    The shifts are of unsigned numbers: where 64-bit integers are signed, mask off the bits that they drag in.

    Args:
        seed: of the run.
        sequence: `sequence_id` of each token.
        position: its place in the sequence.

    Example:
        >>> [f"{h:016x}" for h in token_hash(0, 7, np.arange(2))]
        ['6d8af4cb2937baa9', 'c64a0694ba632083']
    """
    with np.errstate(over="ignore"):
        seeded = _mix(np.asarray(seed % 2**64, np.uint64))
        in_sequence = _mix(seeded + np.asarray(sequence).astype(np.uint64))
        return _mix(in_sequence + np.asarray(position).astype(np.uint64))


def sampled(
    share: float, seed: int, sequence: NDArray[np.integer] | int, position: NDArray[np.integer] | int
) -> NDArray[np.bool_]:
    """Whether each token is kept: where its hash is under share · 2^64.

    Example:
        >>> round(float(sampled(0.25, 0, 3, np.arange(100_000)).mean()), 2)
        0.25
        >>> bool(sampled(1.0, 0, 3, np.arange(9)).all())
        True
    """
    hashes = token_hash(seed, sequence, position)
    limit = int(share * 2**64)
    return np.ones(hashes.shape, np.bool_) if limit >= 2**64 else hashes < np.uint64(limit)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = x + _STEP
    z = (z ^ (z >> np.uint64(30))) * _FIRST
    z = (z ^ (z >> np.uint64(27))) * _SECOND
    return z ^ (z >> np.uint64(31))
