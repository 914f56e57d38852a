"""Rows of a result's table told apart by what they are about, so that the same row of two results can be found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from moescope.core.result import Result

_NUMBERS = {"value", "ci_low", "ci_high", "null", "null_low", "null_high", "control_low", "control_high", "n"}
_ABOUT = ("metric", "layer", "block", "expert", "label")


def key_columns(table: pa.Table) -> list[str]:
    """Columns that say what a row is about: metric, layer, block, expert, label, and other words and whole numbers.

    Whole numbers count only where rows cannot be told apart without them.

    Example:
        >>> key_columns(pa.table({"layer": [0, 1], "value": [0.5, 0.25], "n": [3, 4]}))
        ['layer']
    """
    known = [name for name in _ABOUT if name in table.column_names]
    words = [f.name for f in table.schema if _is_word(f.type) and f.name not in (*known, *_NUMBERS)]
    wholes = [f.name for f in table.schema if pa.types.is_integer(f.type) and f.name not in (*known, *_NUMBERS)]
    chosen: list[str] = list(known)
    for name in (*words, *wholes):
        if _distinct(table, chosen):
            break
        chosen.append(name)
    return chosen


def same_row(row: dict[str, Any], keys: Sequence[str], other: Result) -> dict[str, Any] | None:
    """The one row of another result with equal keys; None where there is none, or more than one."""
    if not set(keys) <= set(other.table.column_names):
        return None
    found = [line for line in other.table.to_pylist() if all(line[key] == row[key] for key in keys)]
    return found[0] if len(found) == 1 else None


def _distinct(table: pa.Table, keys: Sequence[str]) -> bool:
    if not keys:
        return bool(table.num_rows <= 1)
    columns = [table[key].to_pylist() for key in keys]
    return bool(len({tuple(map(str, row)) for row in zip(*columns, strict=True)}) == table.num_rows)


def _is_word(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_boolean(kind))


def where_words(row: dict[str, Any], keys: Sequence[str]) -> str:
    """What a row is about, in words: `layer 3, expert 5`."""
    told = [f"{key} {row[key]}" for key in keys if key != "metric" and row.get(key) not in (None, "")]
    return ", ".join(told)
