"""The list of analyses as a frame that a notebook shows whole, by section."""

from __future__ import annotations

from typing import Any

import pandas as pd

from moescope.core.analysis import SECTION_TITLES
from moescope.core.notebook_html import box, folded, grid, heading

_SHOWN = ("name", "answers", "needs", "parameters")


class AnalysisFrame(pd.DataFrame):  # type: ignore[misc]  # pandas has no types
    """A pandas DataFrame; what is taken from it is a plain one."""

    @property
    def _constructor(self) -> Any:
        return pd.DataFrame

    def _repr_html_(self) -> str:
        if not {"section", *_SHOWN} <= set(self.columns):
            return str(pd.DataFrame(self)._repr_html_())
        titles = {str(key): title for key, title in SECTION_TITLES.items()}
        parts = []
        for section in [*titles, ""]:
            rows: list[Any] = self[self["section"] == section][list(_SHOWN)].values.tolist()
            if rows:
                label = f"{titles.get(section, 'In no section of a report')} ({len(rows)})"
                parts.append(folded(label, grid(rows, _SHOWN)))
        return box(heading(f"{len(self)} analyses", "moescope.analyze(run, name, **parameters) answers one."), *parts)
