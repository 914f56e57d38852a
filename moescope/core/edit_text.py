"""Edits in one line, for the command line and addresses: `ablate layer=3 experts=5,9 how=route_around`."""

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

_RANGE = re.compile(r"(\d{1,9})-(\d{1,9})")
_MOST = 100_000  # numbers of one field; a range is written out
_WORDS = {"none": None, "true": True, "false": False}


def read_edit(text: str) -> Edit:
    """One edit from words: its kind, then `field=value`; several numbers with commas, ranges of whole ones as `0-7`, one number
    that stands as a list with a comma behind it.

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


def write_edit(edit: Edit) -> str:
    """An edit as one line, which `read_edit` reads back; fields that have their default are left out, strength comes last.

    Raises:
        InputError: a vector for each of several experts, which no line can hold.

    Example:
        >>> write_edit(read_edit("ablate strength=0.5 how=route_around experts=5,0,1,2 layer=3"))
        'ablate layer=3 experts=5,0-2 how=route_around strength=0.5'
    """
    values = edit.as_data()
    if values["layer"] is None:
        del values["layer"]
    for late in ("positions", "strength"):  # read from left to right: what, where, how much
        if late in values:
            values[late] = values.pop(late)
    return " ".join([edit.kind, *(f"{name}={_word(edit, name, value)}" for name, value in values.items())])


def _word(edit: Edit, name: str, value: Any) -> str:
    """A field's value as `_value` reads it."""
    if isinstance(value, str):
        return shlex.quote(value)
    if not isinstance(value, tuple):
        return _plain(value)
    if not all(isinstance(item, (int, float)) for item in value):
        raise InputError(
            f"{edit.kind}: {name} cannot be written in a line",
            found=f"{len(value)} vectors",
            fix="save the intervention as JSON",
        )
    return ",".join(_spans(value)) + ("," if len(value) == 1 and name == "layer" else "")


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else repr(value)


def _spans(values: Sequence[Any]) -> list[str]:
    """Numbers, three or more whole ones that follow each other as a range."""
    found, at = [], 0
    while at < len(values):
        end = at + 1
        while end < len(values) and isinstance(values[at], int) and values[end] == values[at] + end - at >= 1:
            end += 1
        if end - at > 2 and values[at] >= 0:
            found.append(f"{values[at]}-{values[end - 1]}")
        else:
            end = at + 1
            found.append(_plain(values[at]))
        at = end
    return found


def _value(text: str, hint: Any) -> Any:
    """What a word stands for in a field of this type; what it cannot be is refused by the edit."""
    if _is_text(hint):
        return text
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    found: list[Any] = []
    for part in text.removesuffix(",").split(","):
        if (span := _RANGE.fullmatch(part)) and len(found) + int(span[2]) - int(span[1]) + 1 >= _MOST:
            raise InputError("a range of an edit is too long", expected=f"fewer than {_MOST:,} numbers", found=part)
        found += _numbers(part)
    return found if "," in text or len(found) != 1 or _only_tuple(hint) else found[0]


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
    """Whether a field takes several values and never one by itself."""
    several = (tuple, Sequence)
    members = (hint,) if typing.get_origin(hint) in several else typing.get_args(hint)
    return any(typing.get_origin(m) in several for m in members) and not {int, float} & set(members)
