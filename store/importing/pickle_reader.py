"""Pickles read without unpickling: opcodes are walked, and nothing that they name is ever imported or called."""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moescope.core.errors import InputError

_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}
_FROM_MARK: dict[str, Callable[[list[Any]], Any]] = {
    "TUPLE": tuple,
    "LIST": list,
    "FROZENSET": frozenset,
    "DICT": lambda items: dict(zip(items[::2], items[1::2], strict=True)),
}
_NOTHING = {"PROTO", "FRAME"}
_PUT = {"PUT", "BINPUT", "LONG_BINPUT"}
_GET = {"GET", "BINGET", "LONG_BINGET"}
_DAMAGE = (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Name:
    """A name that a pickle would import: kept as text, never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


Builders = Mapping[Name, Callable[..., Any]]


def read_pickle(data: bytes, *, called: str, builders: Builders, persistent: Callable[[Any], Any] | None = None) -> Any:
    """The value that a pickle holds: containers, numbers and text, and what `builders` make.

    Args:
        data: the pickle.
        called: what the file is called in messages.
        builders: what is made of `name(*arguments)`, for each name permitted; every other name is refused. What a builder
            makes may have a method `set_state(state)`, which a BUILD opcode then calls.
        persistent: what is made of a persistent id; None where the file may have none.

    Raises:
        InputError: the pickle names something that is not permitted, or is damaged. Nothing was executed.

    Example:
        >>> import pickle
        >>> read_pickle(pickle.dumps({"layer": [1, 2]}), called="a.pkl", builders={})
        {'layer': [1, 2]}
    """
    return _Machine(called, builders, persistent).run(data)


class _Machine:
    """A pickle's stack, memo and marks."""

    def __init__(self, called: str, builders: Builders, persistent: Callable[[Any], Any] | None) -> None:
        self._called, self._builders, self._persistent = called, builders, persistent
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """Walk the opcodes to the end."""
        try:
            for opcode, argument, _ in pickletools.genops(data):
                if opcode.name == "STOP":
                    return self._stack.pop()
                self._step(opcode.name, argument)
        except _DAMAGE as damage:
            raise InputError(f"{self._called} is damaged", found=f"{type(damage).__name__}: {damage}") from damage
        raise InputError(f"{self._called} is damaged", found="a pickle without an end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _FROM_MARK:
            items = self._to_mark()
            self._stack.append(_FROM_MARK[name](items))
        elif name == "MARK":
            self._below.append(stack)
            self._stack = []
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            size = int(name[-1])
            stack[-size:] = [tuple(stack[-size:])]
        elif name in _PUT:
            self._memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in _GET:
            stack.append(self._memo[argument])
        elif name not in _NOTHING:
            self._change(name, argument)

    def _change(self, name: str, argument: Any) -> None:
        """Opcodes that change what lies on the stack, and those that would import or call."""
        stack = self._stack
        if name in ("APPEND", "APPENDS"):
            items = self._to_mark() if name == "APPENDS" else [stack.pop()]
            self._top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._to_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            self._top(dict).update(zip(items[::2], items[1::2], strict=True))
        elif name == "ADDITEMS":
            items = self._to_mark()
            self._top(set).update(items)
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._to_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "GLOBAL":
            stack.append(self._permitted(Name(*argument.split(" ", 1))))
        elif name == "STACK_GLOBAL":
            stack[-2:] = [self._permitted(Name(*stack[-2:]))]
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, called = stack.pop(), stack.pop()
            stack.append(self._built(called, arguments))
        elif name == "BUILD":
            state = stack.pop()
            self._give_state(stack[-1], state)
        elif name == "BINPERSID" and self._persistent is not None:
            stack.append(self._persistent(stack.pop()))
        else:
            raise self._refused(f"the opcode {name}")

    def _to_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._below.pop()
        return items

    def _top(self, kind: type) -> Any:
        if not isinstance(self._stack[-1], kind):
            raise TypeError(f"items for a {type(self._stack[-1]).__name__}")
        return self._stack[-1]

    def _permitted(self, name: Name) -> Name:
        if name not in self._builders:
            raise self._refused(str(name))
        return name

    def _built(self, called: Any, arguments: Any) -> Any:
        if not isinstance(called, Name) or not isinstance(arguments, tuple):
            raise self._refused(f"a call of {called!r}")
        return self._builders[called](*arguments)

    def _give_state(self, value: Any, state: Any) -> None:
        if not hasattr(value, "set_state"):
            raise self._refused(f"a state for a {type(value).__name__}")
        value.set_state(state)

    def _refused(self, what: str) -> InputError:
        return InputError(
            f"{self._called} holds more than data, and was not read",
            expected="lists, dicts, numbers, text and arrays",
            found=what,
            fix="a pickle can run any program when it is opened; nothing of this one was executed. Ask for the trace in "
            "another format (Parquet, npz, CSV)",
        )
