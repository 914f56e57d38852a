"""Answers of analyses, kept: a view that comes back, or a second one of the same result, is not computed again."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from moescope.analysis_api import analyze
from moescope.core.result import Result
from moescope.dashboard.sql.memory_bound import lifted
from moescope.store.store import Store

KEPT = 128
_NAMES_A_RUN = ("other",)


class Answers:
    """The last results of a store, by what was asked; safe for many threads.

    Args:
        store: what the analyses read.

    Example:
        >>> import pathlib, tempfile
        >>> with Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     Answers(store).revision
        0
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.revision = 0
        self._kept: OrderedDict[str, Result] = OrderedDict()
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def ask(self, ask: Mapping[str, Any]) -> Result:
        """The answer to `{"analysis": name, "runs": [names], "given": {parameter: value}}`.

        Incomplete runs are answered too; the result says so. Of a run that is still being written no answer is kept.

        Raises:
            MoescopeError: as `moescope.analyze` does.
        """
        runs = [self.store.run(name) for name in ask["runs"]]
        # A run that a parameter names may be deleted and another get its name: it counts by its id too.
        read = [*runs, *(self.store.run(str(ask["given"][name])) for name in _NAMES_A_RUN if ask["given"].get(name))]
        asked = [ask["analysis"], [(run.run_id, run.status) for run in read], ask["given"]]
        growing = any(run.status == "running" for run in read)
        key = json.dumps(asked, sort_keys=True, default=str)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            lock, revision = self._locks.setdefault(key, threading.Lock()), self.revision
        with lock:
            with self._lock:
                if key in self._kept:
                    return self._kept[key]
            try:
                with lifted():  # a query on the SQL page must not take the memory that an analysis needs
                    result = analyze(runs, ask["analysis"], allow_incomplete=True, **ask["given"])
                if not growing:
                    self._keep(key, result, revision)
            finally:
                with self._lock:
                    self._locks.pop(key, None)
        return result

    def _keep(self, key: str, result: Result, revision: int) -> None:
        with self._lock:
            if revision == self.revision:
                self._kept[key] = result
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)

    def forget(self) -> None:
        """Forget every answer: the store has changed."""
        with self._lock:
            self.revision += 1
            self._kept.clear()
