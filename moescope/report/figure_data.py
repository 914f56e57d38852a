"""A figure as small JSON: without the template that all share, floats to seven digits."""

from __future__ import annotations

import base64
import functools
import gzip
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from moescope.core.result import Result

_DIGITS = 7


def figure_json(result: Result) -> str:
    """Data and layout of a result's figure, safe inside a script element."""
    told = result.figure(titled=False).to_plotly_json()
    layout = {key: value for key, value in told["layout"].items() if key != "template"}
    return embedded({"data": _small(told["data"]), "layout": _small(layout)})


def embedded(data: Any) -> str:
    """JSON that no text inside can end the script element with, nor open a comment."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), default=str, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _small(value: Any) -> Any:
    """Plain data; NaN and infinity are null, whole floats whole numbers."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, dict):
        packed = set(value) >= {"bdata", "dtype"}
        return _small(_unpacked(value)) if packed else {str(key): _small(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_small(item) for item in value]
    if isinstance(value, float):
        return _short(value)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _short(value: float) -> float | None:
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{_DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def _unpacked(packed: dict[str, Any]) -> Any:
    """Plotly writes arrays as base64: read back to numbers that a reader, and a check, can read."""
    array = np.frombuffer(base64.b64decode(packed["bdata"]), dtype=np.dtype(packed["dtype"]))
    shape = packed.get("shape")
    return array.reshape([int(part) for part in str(shape).split(",")]) if shape else array


@functools.cache
def figure_library() -> str:
    """Plotly's script, gzip in base64: 2.0 MB instead of 4.8."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


@functools.cache
def templates() -> dict[str, str]:
    """The templates of light and dark figures."""
    import plotly.io

    found = {}
    for name, stock, ink in (("light", "plotly_white", "#1a1b1e"), ("dark", "plotly_dark", "#e3e5e8")):
        data = _small(plotly.io.templates[stock].to_plotly_json())
        data["layout"]["font"] = {"color": ink}
        found[name] = embedded(data)
    return found
