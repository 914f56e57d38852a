"""Values that cost a query and are asked for again and again, kept for runs that no longer change."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from moescope.store.run import Run

T = TypeVar("T")


_ALL: weakref.WeakSet[Kept[Any]] = weakref.WeakSet()


class Kept(Generic[T]):
    """The last few values, by run and key; safe for many threads.

    Args:
        most: how many are kept.

    Example:
        >>> import pathlib, tempfile
        >>> from moescope.store.store import Store
        >>> with Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = store.begin_run(name="new", model="m")
        ...     Kept[int](4).of(run, "answer", lambda: 42)
        42
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._making: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()
        self._revision = 0
        _ALL.add(self)

    def of(self, run: Run, key: Hashable, make: Callable[[], T]) -> T:
        """The value under a key; made anew each time while the run is not complete."""
        if not run.complete:
            return make()
        place = (run.run_id, key)
        with self._lock:
            making = self._making.setdefault(place, threading.Lock())
        with making:  # who asks meanwhile waits for this one
            with self._lock:
                if place in self._values:
                    self._values.move_to_end(place)
                    return self._values[place]
                revision = self._revision
            value = make()
            with self._lock:
                if revision == self._revision:  # nothing has changed while it was made
                    self._values[place] = value
                    while len(self._values) > self._most:
                        self._values.popitem(last=False)
                self._making.pop(place, None)
        return value

    def forget(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._revision += 1
            self._values.clear()


def forget_all() -> None:
    """Forget everything that is kept: rows of runs that were complete have changed."""
    for kept in list(_ALL):
        kept.forget()
