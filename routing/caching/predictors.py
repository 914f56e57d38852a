"""Predictors of a token's experts that need records only: tables counted on calibration documents."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moescope.routing.caching.streams import Stream
from moescope.routing.trace import Trace

Predictor = Literal["token", "previous_layer", "popularity"]
PREDICTORS: tuple[Predictor, ...] = ("token", "previous_layer", "popularity")
PREDICTOR_NAMES: dict[str, str] = {
    "token": "token-id table",
    "previous_layer": "previous-layer table",
    "popularity": "popularity",
    "none": "no prefetch",
}
_ABOVE_NOTHING = np.float32(1e-6)  # popularity decides where a table has counted nothing, or ties


def predicted_experts(
    trace: Trace,
    streams: list[Stream],
    number: int,
    *,
    predictor: Predictor,
    calibration: NDArray[np.int64],
    evaluation: NDArray[np.int64],
    width: int,
) -> NDArray[np.uint16]:
    """The experts a predictor expects at one layer, the least expected first: [evaluation token, width].

    `token` sums nothing but the row of the token's id; `previous_layer` sums, over the experts the token chose in the layer
    before, the share of their tokens that chose each expert here; `popularity` expects the same experts always. Tokens
    without a key of the first two, such as a first layer's, get the popular experts.

    Args:
        number: which stream.
        calibration, evaluation: rows of the trace.
        width: how many to expect, at most the layer's experts.
    """
    from moescope.routing.caching.predictor_kernels import count_pairs, most_expected

    stream = streams[number]
    seen = stream.ids[calibration]
    popularity = np.bincount(seen.ravel(), minlength=stream.experts)[: stream.experts].astype(np.float32)
    popularity /= max(float(popularity.sum()), 1.0)
    keys, rows = _keys(trace, streams, number, predictor)
    table = np.zeros((rows, stream.experts), np.float32)
    if predictor != "popularity" and rows > 1:
        count_pairs(keys[calibration], seen, table)
        table /= np.maximum(table.sum(1, keepdims=True), 1)
        table += _ABOVE_NOTHING * popularity
    else:
        table += popularity
    out = np.empty((len(evaluation), min(width, stream.experts)), np.uint16)
    most_expected(keys[evaluation], table, out)
    return out


def _keys(trace: Trace, streams: list[Stream], number: int, predictor: Predictor) -> tuple[NDArray[Any], int]:
    """[token, key] rows of the table to look at, and how many rows it has."""
    if predictor == "token":
        found, key = np.unique(trace.token_id, return_inverse=True)
        return key.astype(np.int32)[:, None], len(found)
    if predictor == "previous_layer" and number:
        before = streams[number - 1]
        return before.ids, int(before.ids.max(initial=0)) + 1
    return np.zeros((trace.tokens, 1), np.int32), 1
