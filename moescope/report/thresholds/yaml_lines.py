"""YAML read with the line of every key, so that a mistake can be shown where it is."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moescope.core.errors import InputError

_LARGEST = 1_000_000


@dataclass(frozen=True)
class Lines:
    """Place in the data (keys and numbers of entries, from the outside in) → line, from 1."""

    of: dict[tuple[Any, ...], int]

    def at(self, *place: Any) -> int:
        """The line of a place; of what it lies in, where it is not in the file."""
        while place and place not in self.of:
            place = place[:-1]
        return self.of.get(place, 1)


def read_yaml(path: Path) -> tuple[Any, Lines]:
    """The data of a YAML file of one document, and where each key stands.

    Only plain data: no tags of Python, no anchors that refer back, no key twice.

    Raises:
        InputError: no such file, too large, or not such YAML; with the line.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise InputError(f"{path} cannot be read as text", found="a folder, a pipe or a device")
        if size > _LARGEST:
            raise InputError(f"{path} is too large for a file of settings", found=f"{size:,} bytes")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as missing:
        raise InputError(f"there is no file {path}", fix="check the path") from missing
    except (OSError, UnicodeDecodeError) as unreadable:
        raise InputError(f"{path} cannot be read as text", found=str(unreadable)) from unreadable
    lines: dict[tuple[Any, ...], int] = {}
    try:
        # Anchors are refused: a few lines of them can stand for gigabytes.
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise InputError(f"{path}, line {event.start_mark.line + 1}: references (*name) are not read here")
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            data = None if node is None else _data(loader, node, (), lines, path)
        finally:
            loader.dispose()
    except (yaml.YAMLError, RecursionError, ValueError) as wrong:
        mark = getattr(wrong, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        said = str(getattr(wrong, "problem", None) or wrong).splitlines()[0][:200]
        raise InputError(f"{path}{where} is not YAML", found=said) from wrong
    return data, Lines(lines)


def _data(
    loader: yaml.SafeLoader, node: Any, place: tuple[Any, ...], lines: dict[tuple[Any, ...], int], path: Path
) -> Any:
    lines.setdefault(place, node.start_mark.line + 1)
    if node.tag.rpartition(":")[0] != "tag:yaml.org,2002" or ":python/" in node.tag:
        raise InputError(f"{path}, line {node.start_mark.line + 1}: tags (!name) are not read here", found=node.tag)
    if isinstance(node, yaml.MappingNode):
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                raise InputError(f"{path}, line {line}: a key is a word", found=repr(key))
            if key in found:
                raise InputError(f"{path}, line {line}: the key {key!r} is there twice", fix="keep one of them")
            lines[(*place, key)] = line
            found[key] = _data(loader, value_node, (*place, key), lines, path)
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_data(loader, entry, (*place, number), lines, path) for number, entry in enumerate(node.value)]
    return loader.construct_object(node, deep=True)
