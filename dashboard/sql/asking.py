"""From what the browser asks to the answer; the last answers are kept, so that a chart does not ask anew."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import IO, Any

from moescope.core.errors import InputError
from moescope.dashboard.sql.box import SqlBox
from moescope.dashboard.sql.files import FileKind, written
from moescope.dashboard.sql.given import values_for
from moescope.dashboard.sql.one_select import OneSelect, one_select, written_in_full
from moescope.dashboard.sql.outcome import Outcome
from moescope.store.store import Store

_KEPT = 4


class Asking:
    """Answers `{"sql": …, "given": {parameter: text}, "who": tab, "again": count}`.

    Args:
        store: for the run that `$run` means.
        box: runs the queries.
    """

    def __init__(self, store: Store, box: SqlBox) -> None:
        self._store, self._box = store, box
        self._kept: OrderedDict[str, Outcome] = OrderedDict()
        self._lock = threading.Lock()

    def ask(self, ask: Mapping[str, Any], run: str | None) -> Outcome:
        """The answer; raises `InputError` where there is none."""
        key = json.dumps([ask, run], sort_keys=True)
        with self._lock:
            if key in self._kept:
                return self._kept[key]
        query, values = self._read(ask, run)
        outcome = self._box.run(query, values, who=str(ask.get("who", "")))
        with self._lock:
            self._kept[key] = outcome
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return outcome

    def file(self, ask: Mapping[str, Any], run: str | None, kind: FileKind) -> IO[bytes]:
        """The whole result as a file; raises `InputError` where there is none."""
        query, values = self._read(ask, run)
        return written(self._box, query, values, kind, who=f"{ask.get('who', '')} file")

    def _read(self, ask: Mapping[str, Any], run: str | None) -> tuple[OneSelect, dict[str, Any]]:
        sql, texts = ask.get("sql"), ask.get("given") or {}
        if not (isinstance(sql, str) and isinstance(texts, Mapping) and isinstance(run, str | None)):
            raise InputError("that is no query", expected="sql and run as text, given as names and their texts")
        query = one_select(sql)
        if run and not written_in_full(run):
            raise InputError("the run's name has half a character in it")
        run_id = self._store.run(run).run_id if run and "run" in query.parameters else None
        given = {str(name): str(text) for name, text in texts.items()}
        return query, values_for(query.parameters, given, run_id=run_id)
