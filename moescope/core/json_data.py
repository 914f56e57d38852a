"""JSON as every reader takes it: it has no NaN and no infinity, so these become null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def to_json(data: Any, *, indent: int | None = None) -> str:
    """Data as JSON text; numbers that are not finite become null, what JSON does not know becomes its text.

    Example:
        >>> to_json({"a": float("nan"), "b": [1, 2.5]})
        '{"a": null, "b": [1, 2.5]}'
    """
    return json.dumps(_finite(data), indent=indent, default=str, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
