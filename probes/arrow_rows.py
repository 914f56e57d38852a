"""Arrays as Arrow columns, without copying where that is possible."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def constant(value: str, rows: int) -> pa.Array:
    """The same text in every row, stored once."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), pa.array([value]))


def lists(values: NDArray[Any], kind: pa.DataType) -> pa.ListArray:
    """A [row, k] array as a column of lists."""
    rows, width = values.shape
    offsets = (
        pa.array(np.arange(0, rows * width + 1, width, dtype=np.int32))
        if width
        else pa.array(np.zeros(rows + 1, np.int32))
    )
    return pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(values).ravel(), kind))


def triples(values: NDArray[Any], kind: pa.DataType) -> pa.FixedSizeListArray:
    """A [row, 3] array as a column of fixed-size lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).ravel(), kind), values.shape[1])


def slot_order(weights: NDArray[np.floating[Any]], ids: NDArray[np.integer[Any]]) -> NDArray[np.int64] | None:
    """The store's slot order for [token, k]: weight descending, ties by lower id; None where slots already are in it."""
    falling = weights[:, :-1] > weights[:, 1:]
    if falling.all():
        return None
    return np.lexsort((ids, -weights), axis=-1)
