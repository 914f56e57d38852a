"""Files of options: `--config run.yaml` gives any flag of any command, and the command line has the last word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moescope.core.errors import InputError

if TYPE_CHECKING:
    from moescope.cli.parser import Flag

_LARGEST = 1_000_000  # bytes; a file of options is a page, and a longer one is another file
_SHOWN = 60  # characters of a wrong value
_BITS = 64  # of a whole number
_WORDS = {int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Entry:
    """A key of the file, its value, and the line it stands on.

    Args:
        key: as it is written.
        value: a plain value, a list of them, or the entries of a section.
        line: from 1.
        raw: the value's text as it is written, or a list of these; None of a section.
    """

    key: str
    value: Any
    line: int
    raw: Any = None


def read_config(path: Path, command: str, known: Mapping[str, Sequence[Flag]]) -> dict[str, Any]:
    """The values that a file gives a command, by the names of the command's parameters.

    A file holds the flags of one command, `batch-size: 4` or `batch_size: 4`, a line each. One file serves several
    commands where each has a section of its own, `profile:` or `sae train:`; what stands outside the sections then goes
    to every command that has such a flag.

    Args:
        path: the file, YAML.
        command: the command's words: `sae train`.
        known: the flags of every command.

    Raises:
        InputError: no file, no YAML, an unknown key, or a value that the flag does not take.
    """
    entries = _entries(path)
    plain = {flag.name.replace("-", "_") for flags in known.values() for flag in flags}
    entries = [entry for entry in entries if not (entry.key in known and _empty(entry, plain))]
    sections = {entry.key: entry for entry in entries if isinstance(entry.value, list) and _nested(entry.value)}
    for name, section in sections.items():
        if name in known:
            _taken(path, section.value, known[name], others=())  # a wrong key in any of them is told at once
        elif name.replace("-", "_") in plain:
            first = section.value[0]
            raise _wrong(path, section, f"a value, or a list such as [{first.key}={first.raw}]")
        else:
            raise _unknown(path, section, known, "command")
    shared = [entry for entry in entries if entry.key not in sections]
    found = _taken(path, shared, known[command], others=[known[name] for name in sections])
    own = sections.get(command)
    return found | (_taken(path, own.value, known[command], others=()) if own is not None else {})


def _empty(entry: Entry, flags: Iterable[str]) -> bool:
    """Whether it is a section that says nothing; a command may have the name of a flag, which may be an empty list."""
    return entry.value is None or (entry.value == [] and (entry.raw is None or entry.key not in flags))


def _taken(
    path: Path, entries: Iterable[Entry], flags: Sequence[Flag], *, others: Sequence[Sequence[Flag]]
) -> dict[str, Any]:
    """Values by parameter; a key that only another command of the file has is passed over."""
    mine = {flag.name.replace("-", "_"): flag for flag in flags}
    theirs = {flag.name.replace("-", "_") for each in others for flag in each}
    found: dict[str, Any] = {}
    for entry in entries:
        key = entry.key.replace("-", "_")
        if key not in mine and key not in theirs:
            raise _unknown(path, entry, [*(flag.name for flag in flags), *sorted(theirs)], "flag")
        if key in mine and entry.value is not None:
            found[mine[key].variable] = _value(path, entry, mine[key])
    return found


def _unknown(path: Path, entry: Entry, known: Iterable[str], what: str) -> InputError:
    names = sorted({name.replace("_", "-") if what == "flag" else name for name in known})
    near = difflib.get_close_matches(entry.key.replace("_", "-"), names, n=3, cutoff=0.5)
    return InputError(
        f"{path}, line {entry.line}: there is no {what} {entry.key!r}",
        expected=None if near else f"one of {', '.join(names)}",
        fix=f"did you mean {' or '.join(near)}?" if near else None,
    )


def _value(path: Path, entry: Entry, flag: Flag) -> Any:
    several = flag.repeatable or flag.values > 1
    given = entry.value if isinstance(entry.value, list) else [entry.value]
    if isinstance(entry.value, list) and not several:
        raise _wrong(
            path, entry, f"one value; several are written {flag.name}: a,b" if flag.kind is str else _word(flag)
        )
    if flag.values > 1 and len(given) != flag.values:
        raise _wrong(path, entry, f"a list of {flag.values}")
    raws = entry.raw if isinstance(entry.raw, list) else [entry.raw]
    if len(raws) != len(given):  # a tag made a list of what is not written as one
        raise _wrong(path, entry, "a list such as [a, b]" if several else _word(flag))
    read = [
        _one(path, replace(entry, value=value, raw=raw), flag, raw)  # messages show the part that is wrong
        for value, raw in zip(given, raws, strict=True)
    ]
    return read if several else read[0]


def _one(path: Path, entry: Entry, flag: Flag, raw: str) -> Any:
    """One value as the flag's type; text stays as it is written, 007 and 1.10 too, and no number is a switch."""
    value, switch = entry.value, isinstance(entry.value, bool)
    if flag.kind is bool or switch or value is None or isinstance(value, list):
        if flag.kind is bool and switch:
            return value
        raise _wrong(path, entry, _word(flag))
    if flag.kind in (int, float):
        try:
            number = flag.kind(value) if flag.kind is float or isinstance(value, int) else None
        except (ValueError, OverflowError):
            number = None
        if isinstance(number, int) and number.bit_length() >= _BITS:
            number = None
        if number is None or (flag.least is not None and number < flag.least):
            raise _wrong(path, entry, _word(flag))
        if flag.most is not None and number > flag.most:
            raise _wrong(path, entry, _word(flag))
        return number
    if flag.choices and raw not in flag.choices:
        raise _wrong(path, entry, ", ".join(flag.choices))
    return raw


def _word(flag: Flag) -> str:
    said = _WORDS.get(flag.kind, "text")
    if flag.least is not None and flag.most is not None:
        return f"{said} from {flag.least:g} to {flag.most:g}"
    return f"{said}, {flag.least:g} or more" if flag.least is not None else said


def _wrong(path: Path, entry: Entry, expected: str) -> InputError:
    return InputError(f"{path}, line {entry.line}: {entry.key} cannot be {_shown(entry)}", expected=expected)


def _shown(entry: Entry) -> str:
    value = entry.value
    if isinstance(value, list):
        return "a section" if _nested(value) else "a list"
    written = repr(value) if isinstance(value, str) else str(entry.raw)  # text is marked as text
    shown = str(value).lower() if isinstance(value, bool) else written
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"


def _nested(value: list[Any]) -> bool:
    return bool(value) and isinstance(value[0], Entry)


def _entries(path: Path) -> list[Entry]:
    import yaml

    try:
        size = path.stat().st_size
        if not path.is_file():
            raise InputError(f"{path} is no file of options", found="a folder, a pipe or a device")
        if size > _LARGEST:
            raise InputError(f"{path} is no file of options", found=f"{size:,} bytes")
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        return [] if node is None else list(_mapped(path, node, depth=0))
    except OSError as unread:
        raise InputError(f"cannot read {path}", found=unread.strerror, fix="check the path after --config") from unread
    except (UnicodeDecodeError, ValueError, RecursionError) as unread:
        raise InputError(f"{path} is no file of options", expected="YAML in UTF-8", found=str(unread)) from unread
    except yaml.MarkedYAMLError as broken:
        where = "" if broken.problem_mark is None else f", line {broken.problem_mark.line + 1}"
        raise InputError(f"{path}{where}: this is no YAML", found=broken.problem) from broken
    except yaml.YAMLError as broken:
        raise InputError(f"{path} is no YAML", found=str(broken).replace("\n", " ")) from broken


def _mapped(path: Path, node: Any, *, depth: int) -> Iterator[Entry]:
    """The keys of a YAML mapping with their lines; a mapping inside gives a list of entries."""
    import yaml

    line = node.start_mark.line + 1
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f"{path}, line {line}: options are keys and values", expected="lines such as batch-size: 4")
    seen: set[str] = set()
    for key_node, value_node in node.value:
        at = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise InputError(f"{path}, line {at}: a key is a word", expected="the name of a flag")
        key = str(key_node.value)
        if key.replace("-", "_") in seen:
            raise InputError(f"{path}, line {at}: {key} is there twice", fix="keep one of them")
        seen.add(key.replace("-", "_"))
        if isinstance(value_node, yaml.MappingNode):
            if depth:
                raise InputError(f"{path}, line {at}: {key} cannot be a section", expected="a flag and its value")
            yield Entry(key, list(_mapped(path, value_node, depth=1)), at)
            continue
        value = _plain(path, value_node)
        raw = [part.value for part in value_node.value] if isinstance(value, list) else value_node.value
        yield Entry(key, value, at, raw)


def _plain(path: Path, node: Any) -> Any:
    import yaml

    if isinstance(node, yaml.SequenceNode):
        if any(not isinstance(part, yaml.ScalarNode) for part in node.value):
            raise InputError(
                f"{path}, line {node.start_mark.line + 1}: a list holds plain values", expected="such as [a, b]"
            )
        return [_plain(path, part) for part in node.value]
    try:
        value = yaml.SafeLoader("").construct_object(node)
    except (ValueError, KeyError, IndexError, AttributeError, OverflowError):
        value = str(node.value)  # !!int x, or the 30th of February
    return value if isinstance(value, (str, int, float)) or value is None else str(node.value)  # dates stay text


def as_yaml(command: str, flags: Sequence[Flag], values: Mapping[str, Any]) -> str:
    """Options in force, as a file that `--config` reads; what is not set, and what is secret, is left out."""
    import yaml

    shown = [(flag, _written(values[flag.variable])) for flag in flags if not flag.secret]
    # An empty list is written where several are the default, or it would come back as these.
    kept = {flag.name: value for flag, value in shown if value is not None and (value != [] or flag.default)}
    written: str = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=1000)
    return f"# moescope {command}\n{written}"


def _written(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_written(part) for part in value]
    return str(value) if isinstance(value, Path) else value
