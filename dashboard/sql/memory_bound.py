"""A bound on the memory that a query takes outside DuckDB's own account: long texts and lists made by its functions."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOCK = threading.Lock()
_INSIDE = 0
_BEFORE: list[tuple[int, int]] = []
_PAGES = Path("/proc/self/statm")


@contextmanager
def bounded_memory(more: int) -> Iterator[None]:
    """Let the process grow by at most `more` bytes inside; what asks for more is told that there is none.

    DuckDB answers that with an error of the query. The bound holds for the whole process, so it is wide and short; where the
    system has no such bound (only Linux does), DuckDB's own account is all there is.
    """
    global _INSIDE  # noqa: PLW0603  the bound is one of the process
    with _LOCK:
        if _INSIDE == 0:
            _set(more)
        _INSIDE += 1
    try:
        yield
    finally:
        with _LOCK:
            _INSIDE -= 1
            if _INSIDE == 0:
                _restore()


def half_of_the_rest() -> int:
    """Half of the memory that the machine has left, in bytes; 4 GiB where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return 4 << 30
    return next((int(line.split()[1]) << 9 for line in lines if line.startswith("MemAvailable:")), 4 << 30)


def _set(more: int) -> None:
    try:
        import resource

        data = int(_PAGES.read_text(encoding="ascii").split()[5]) * resource.getpagesize()
        before = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = data + more
        soft = wanted if before[0] == resource.RLIM_INFINITY else min(before[0], wanted)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, before[1]))
    except (ImportError, OSError, ValueError):  # another system
        return
    _BEFORE.append(before)


def _restore() -> None:
    if _BEFORE:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, _BEFORE.pop())
