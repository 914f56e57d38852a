"""What a query gave: columns, and as many rows as a page can hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["whole", "number", "text", "time", "truth"]

_WHOLE = (
    "TINYINT",
    "SMALLINT",
    "INTEGER",
    "BIGINT",
    "HUGEINT",
    "UTINYINT",
    "USMALLINT",
    "UINTEGER",
    "UBIGINT",
    "UHUGEINT",
)
_EXACT = 2**53  # a browser's numbers are exact up to here


@dataclass(frozen=True)
class Column:
    """One column: its name, its type as DuckDB names it, and how it is shown."""

    name: str
    type: str

    @property
    def kind(self) -> Kind:
        """What its values are to a reader."""
        if self.type in _WHOLE:
            return "whole"
        if self.type in ("FLOAT", "DOUBLE") or self.type.startswith("DECIMAL"):
            return "number"
        if self.type == "BOOLEAN":
            return "truth"
        return "time" if self.type.startswith(("DATE", "TIME")) and not self.type.endswith("]") else "text"


@dataclass(frozen=True)
class Outcome:
    """The answer to one query.

    Attributes:
        columns: of the result.
        rows: the first of them; texts are cut.
        more: whether the result has others.
        why_cut: why not more of them are here.
        seconds: how long it took.
    """

    columns: tuple[Column, ...]
    rows: list[tuple[Any, ...]]
    more: bool
    why_cut: str
    seconds: float


def shown_as(column: Column, place: str, longest: int) -> str:
    """SQL that brings a column's value into a form that a page can hold: numbers and truths as they are, the rest as text."""
    if column.kind in ("whole", "number", "truth"):
        return f"{place}::DOUBLE" if column.type.startswith("DECIMAL") else place
    return f"left({place}::VARCHAR, {longest + 1})"


def tidy(row: Sequence[Any], longest: int) -> tuple[Any, ...]:
    """A row whose values go through JSON unharmed: cut texts, and as text what a browser's numbers cannot hold."""
    return tuple(_tidy(value, longest) for value in row)


def _tidy(value: Any, longest: int) -> Any:
    if isinstance(value, str):
        return value if len(value) <= longest else value[:longest] + "…"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, int) and abs(value) > _EXACT:
        return str(value)
    return value


def weight(row: Sequence[Any]) -> int:
    """About how many bytes a row takes on its way to the browser."""
    return sum(len(value) + 4 if isinstance(value, str) else 10 for value in row)
