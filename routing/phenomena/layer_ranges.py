"""Layer numbers as a reader would say them."""

from __future__ import annotations

from collections.abc import Iterable


def layer_ranges(layers: Iterable[int]) -> str:
    """Numbers in order, runs of three or more as a range.

    Example:
        >>> layer_ranges([11, 2, 3, 12, 13, 14])
        '2, 3, 11 to 14'
    """
    runs: list[list[int]] = []
    for layer in sorted({int(layer) for layer in layers}):
        if runs and runs[-1][-1] + 1 == layer:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
