"""Values of edits' fields: brought to the declared type, or refused with the field named; packed for JSON and read back."""

from __future__ import annotations

import base64
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Literal, Union

import numpy as np

from moescope.core.errors import InputError

_LONG = 16  # numbers from which on a vector is packed
_PACKED = "float64"


def field_types(cls: type) -> dict[str, Any]:
    """The types of a class's fields, class variables left out."""
    return _field_types(cls)


@cache
def _field_types(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def fitted(value: Any, hint: Any, field: str) -> Any:
    """A value as its field's type wants it: numbers of other libraries as Python's, sequences and arrays as tuples.

    Raises:
        InputError: a value of another type, a number that is not finite, a word that is none of those allowed.

    Example:
        >>> fitted([1, 2.0], tuple[float, ...], "vector")
        (1.0, 2.0)
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return _one_of(value, arguments, field)
    if origin is Literal:
        return _word(value, arguments, field)
    if origin in (tuple, Sequence):
        return _several(value, arguments[0], field)
    if hint is float and not isinstance(value, (bool, str, bytes)):
        return _finite(value, field)
    whole = hint is int and not isinstance(value, (bool, np.bool_)) and _is_whole(value)
    if whole or (hint is bool and isinstance(value, np.bool_)):
        return hint(value)
    if hint is not int and isinstance(value, hint):
        return value
    raise InputError(f"{field} cannot be {_short(value)}", expected=_NAMES.get(hint, str(hint)))


def packed(value: Any) -> Any:
    """A value as JSON holds it exactly; long vectors as base64 of little-endian float64.

    Example:
        >>> packed((1, 2)), packed((0.1,) * 20)["shape"]
        ([1, 2], [20])
    """
    if not isinstance(value, tuple):
        return value
    nested = bool(value) and all(isinstance(item, tuple) for item in value)
    numbers: Any = [x for item in value for x in item] if nested else value
    if len(numbers) > _LONG and all(isinstance(x, float) for x in numbers):
        array = np.asarray(value, dtype="<f8")
        return {_PACKED: base64.b64encode(array.tobytes()).decode(), "shape": list(array.shape)}
    return [packed(item) for item in value]


def unpacked(value: Any, field: str) -> Any:
    """What `packed` made JSON of, sequences as tuples.

    Raises:
        InputError: packed numbers that are none.
    """
    if isinstance(value, list):
        return tuple(unpacked(item, field) for item in value)
    if isinstance(value, dict):
        try:
            array = np.frombuffer(base64.b64decode(value[_PACKED], validate=True), dtype="<f8")
            return _as_tuples(array.reshape(value["shape"]).tolist())
        except (KeyError, TypeError, ValueError) as broken:
            raise InputError(
                f"{field} cannot be read", expected=f"{{{_PACKED!r}: base64, 'shape': […]}}", found=str(broken)
            ) from broken
    return value


_NAMES = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "a word",
    types.NoneType: "nothing",
}


def _one_of(value: Any, hints: Sequence[Any], field: str) -> Any:
    if value is None and types.NoneType in hints:
        return None
    refused: InputError | None = None
    for hint in (h for h in hints if h is not types.NoneType):
        try:
            return fitted(value, hint, field)
        except InputError as error:
            tuples = typing.get_origin(hint) in (tuple, Sequence)
            refused = error if refused is None or (tuples and not np.isscalar(value)) else refused
    assert refused is not None
    raise refused


def _word(value: Any, words: tuple[Any, ...], field: str) -> Any:
    if isinstance(value, str) and value in words:
        return value
    near = difflib.get_close_matches(str(value), map(str, words), 1)
    fix = f"did you mean {near[0]!r}?" if near else None
    raise InputError(f"{field} cannot be {value!r}", expected=", ".join(map(str, words)), fix=fix)


def _several(value: Any, hint: Any, field: str) -> tuple[Any, ...]:
    given = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise InputError(f"{field} cannot be {_short(value)}", expected="several values in a list")
    items = list(given)
    if hint is float and all(type(x) is float for x in items):
        if bad := [x for x in items if not math.isfinite(x)]:
            return (_finite(bad[0], field),)
        return tuple(items)
    return tuple(fitted(item, hint, field) for item in items)


def _finite(value: Any, field: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{field} cannot be {_short(value)}", expected=_NAMES[float])
    return number


def _is_whole(value: Any) -> bool:
    try:
        return not isinstance(value, (str, bytes, float)) and int(value) == value
    except (TypeError, ValueError):
        return False


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
