"""A bar that is moved on by counts of what was just done."""

from __future__ import annotations

import time
from collections.abc import Callable

from moescope.probes.progress import RunProgress


def ticker(bar: RunProgress) -> Callable[[int], None]:
    """Counts tokens or vectors into a bar, and tells it how long they took.

    Args:
        bar: whose total is a number of the same.

    Example:
        >>> with RunProgress("vectors", 100, shown=False) as bar:
        ...     tick = ticker(bar)
        ...     tick(40), tick(60)
        (None, None)
    """
    done, started = 0, time.perf_counter()

    def tick(count: int) -> None:
        nonlocal done
        done += count
        bar.advance_to(done, done, time.perf_counter() - started)

    return tick
