"""NumPy arrays, scalars and counters as pickles describe them, built here from checked bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.store.importing.pickle_reader import Builders, Name

_NUMBER = re.compile(r"[<>|=]?[biuf]\d{1,2}")


class PickledType:
    """A number's type: `numpy.dtype('i8')`; raises `ValueError` for any type that is not a number's."""

    def __init__(self, code: Any, _align: Any = False, _copy: Any = False) -> None:
        if not isinstance(code, str) or not _NUMBER.fullmatch(code):
            raise ValueError(f"arrays of type {code!r} hold no numbers")
        self.dtype = np.dtype(code)

    def set_state(self, state: tuple[Any, ...]) -> None:
        """Its byte order: `(version, order, …)`."""
        if state[1] not in ("<", ">", "|", "="):
            raise ValueError(f"unknown byte order {state[1]!r}")
        self.dtype = self.dtype.newbyteorder(state[1])


class PickledArray:
    """An array that is empty until its state comes."""

    def __init__(self, *_: Any) -> None:
        self.array: NDArray[Any] = np.empty(0)

    def set_state(self, state: tuple[Any, ...]) -> None:
        """Shape, type, order and bytes: `(version, shape, dtype, is_fortran, bytes)`."""
        _, shape, kind, fortran, raw = state
        self.array = _from_bytes(raw, kind, shape, "F" if fortran else "C")


def _from_bytes(raw: Any, kind: Any, shape: Any, order: str = "C") -> NDArray[Any]:
    if not isinstance(kind, PickledType) or not isinstance(raw, (bytes, bytearray)) or order not in ("C", "F"):
        raise ValueError("arrays of objects hold more than numbers")
    shape = tuple(int(size) for size in shape)
    if min(shape, default=0) < 0 or math.prod(shape) * kind.dtype.itemsize != len(raw):
        raise ValueError(f"{len(raw)} bytes for an array of shape {shape}")
    return np.frombuffer(raw, kind.dtype).reshape(shape, order="F" if order == "F" else "C")


def _buffer(raw: Any, kind: Any, shape: Any, order: Any) -> PickledArray:
    made = PickledArray()
    made.array = _from_bytes(raw, kind, shape, order)
    return made


def _scalar(kind: Any, raw: Any) -> Any:
    return _from_bytes(raw, kind, (1,))[0].item()


def _encoded(text: Any, encoding: Any = "latin1") -> bytes:
    if encoding != "latin1" or not isinstance(text, str):
        raise ValueError(f"text encoded as {encoding!r}")
    return text.encode("latin1")


def _counted(counts: Any = ()) -> dict[Any, Any]:
    return dict(counts)


def _empty_dict(*_: Any) -> dict[Any, Any]:
    return {}


def _sequence(kind: type) -> Any:
    return lambda items=(): kind(items) if isinstance(items, (list, tuple, set, frozenset)) else kind()


def _never(*_: Any) -> None:
    raise ValueError("a type that is only named cannot be called")


def number_builders() -> Builders:
    """Builders of everything that pickles of numbers in containers name, as NumPy 1 and 2 spell it."""
    names: dict[Name, Callable[..., Any]] = {
        Name("collections", "Counter"): _counted,
        Name("collections", "OrderedDict"): _counted,
        Name("collections", "defaultdict"): _empty_dict,
        Name("numpy", "dtype"): PickledType,
        Name("numpy", "ndarray"): _never,
        Name("_codecs", "encode"): _encoded,
    }
    for module in ("numpy.core", "numpy._core"):
        names |= {
            Name(f"{module}.multiarray", "_reconstruct"): PickledArray,
            Name(f"{module}.multiarray", "scalar"): _scalar,
            Name(f"{module}.numeric", "_frombuffer"): _buffer,
        }
    for builtins in ("builtins", "__builtin__"):
        names |= {Name(builtins, kind.__name__): _sequence(kind) for kind in (list, tuple, set, frozenset)}
        names |= {Name(builtins, "dict"): _counted, Name(builtins, "int"): _never, Name(builtins, "float"): _never}
        names |= {Name(builtins, kind): _plain_bytes for kind in ("bytearray", "bytes")}
    return names


def _plain_bytes(raw: Any = b"", encoding: Any = "latin1") -> bytes:
    return bytes(raw) if isinstance(raw, (bytes, bytearray)) else _encoded(raw, encoding)


def plain(value: Any) -> Any:
    """Containers with arrays in the place of what stood for them. Shared parts stay shared.

    Raises:
        ValueError: a container that holds itself.
    """
    return _plain(value, {}, set())


def _plain(value: Any, done: dict[int, Any], open_: set[int]) -> Any:
    if isinstance(value, PickledArray):
        return value.array
    if not isinstance(value, (list, tuple, dict)):
        return value
    if id(value) in done:
        return done[id(value)]
    if id(value) in open_:
        raise ValueError("a container holds itself")
    open_.add(id(value))
    if isinstance(value, dict):
        made: Any = {key: _plain(item, done, open_) for key, item in value.items()}
    elif value and all(type(item) in (int, float, str, bool) for item in value):
        made = value
    else:
        made = type(value)(_plain(item, done, open_) for item in value)
    open_.discard(id(value))
    done[id(value)] = made
    return made
