"""A bound on the memory that a query takes outside DuckDB's own account: long texts and lists made by its functions."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_PAGES = Path("/proc/self/statm")


@dataclass
class _Bound:
    """The bound of this process, of which there is one."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    inside: int = 0
    lifted: int = 0
    more: int = 0
    before: list[tuple[int, int]] = field(default_factory=list)


_BOUND = _Bound()


@contextmanager
def bounded_memory(more: int) -> Iterator[None]:
    """Let the process grow by at most `more` bytes inside; what asks for more is told that there is none.

    DuckDB answers that with an error of the query. The bound holds for the whole process, so it is wide, and `lifted` while
    others work; where the system has no such bound (only Linux does), DuckDB's own account is all there is.
    """
    with _BOUND.lock:
        _BOUND.inside += 1
        if _BOUND.inside == 1:
            _BOUND.more = more
            if not _BOUND.lifted:
                _set(more)
    try:
        yield
    finally:
        with _BOUND.lock:
            _BOUND.inside -= 1
            if _BOUND.inside == 0:
                _restore()


@contextmanager
def lifted() -> Iterator[None]:
    """No bound inside, for work that needs memory of its own while a query runs; the query is bound again afterwards."""
    with _BOUND.lock:
        _BOUND.lifted += 1
        _restore()
    try:
        yield
    finally:
        with _BOUND.lock:
            _BOUND.lifted -= 1
            if _BOUND.lifted == 0 and _BOUND.inside:
                _set(_BOUND.more)


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
    _BOUND.before.append(before)


def _restore() -> None:
    if _BOUND.before:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, _BOUND.before.pop())
