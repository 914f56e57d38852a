"""Edits in one line, for the command line: `ablate layer=3 experts=5,9 how=route_around`."""

from __future__ import annotations

import difflib
import re
import shlex
import typing
from collections.abc import Sequence
from typing import Any, Literal

from moescope.core.edit import Edit, edits
from moescope.core.edit_values import field_types
from moescope.core.errors import InputError

_RANGE = re.compile(r"(\d+)-(\d+)")
_WORDS = {"none": None, "true": True, "false": False}


def read_edit(text: str) -> Edit:
    """One edit from words: its kind, then `field=value`; several numbers with commas, ranges of whole ones as `0-7`.

    Raises:
        InputError: an unknown kind or field, a field given twice, or a value that does not fit.

    Example:
        >>> read_edit("ablate layer=3 experts=5,9 how=route_around positions=generated")
        Ablate(layer=3, experts=[5, 9], how='route_around', positions='generated')
        >>> read_edit("keep layer=0-2 experts=0-7").layers
        (0, 1, 2)
    """
    try:
        words = shlex.split(text)
    except ValueError as broken:
        raise InputError(f"{text!r} is no edit", found=str(broken)) from broken
    if not words:
        raise InputError("an edit is missing", expected=f"a kind and its fields, for instance {_EXAMPLE!r}")
    kind, known = edits[words[0]], field_types(edits[words[0]])
    values: dict[str, Any] = {}
    for word in words[1:]:
        name, equals, value = word.partition("=")
        if not equals or name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise InputError(
                f"an edit {words[0]!r} has no field {name!r}" if equals else f"{word!r} is no field of an edit",
                expected=f"field=value, of {', '.join(known)}",
                fix=f"did you mean {near[0]}=…?" if near else None,
            )
        if name in values:
            raise InputError(f"{name} is given twice", found=text)
        values[name] = _value(value, known[name])
    return kind(**values)


_EXAMPLE = "ablate layer=3 experts=5,9 how=route_around"


def _value(text: str, hint: Any) -> Any:
    """What a word stands for in a field of this type; what it cannot be is refused by the edit."""
    if _is_text(hint):
        return text
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    found = [number for part in text.split(",") for number in _numbers(part)]
    return found if "," in text or len(found) != 1 else found[0] if not _only_tuple(hint) else found


def _numbers(part: str) -> list[Any]:
    if span := _RANGE.fullmatch(part):
        return list(range(int(span[1]), int(span[2]) + 1))
    for read in (int, float):
        try:
            return [read(part)]
        except ValueError:
            continue
    return [part]


def _is_text(hint: Any) -> bool:
    members = (hint, *typing.get_args(hint))
    return str in members or typing.get_origin(hint) is Literal


def _only_tuple(hint: Any) -> bool:
    members = (hint, *typing.get_args(hint))
    return any(typing.get_origin(m) in (tuple, Sequence) for m in members) and not {int, float} & set(
        typing.get_args(hint)
    )
