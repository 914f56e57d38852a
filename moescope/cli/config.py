"""Files of options: `--config run.yaml` gives any flag of any command, and the command line has the last word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moescope.core.errors import InputError

if TYPE_CHECKING:
    from moescope.cli.parser import Flag

_LARGEST = 1_000_000  # bytes; a file of options is a page, and a longer one is another file
_WORDS = {int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class Entry:
    """A key of the file, its value, and the line it stands on."""

    key: str
    value: Any
    line: int


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
    sections = {entry.key: entry for entry in entries if isinstance(entry.value, list) and _nested(entry.value)}
    for name, section in sections.items():
        if name not in known:
            raise _unknown(path, section, known, "command")
    shared = [entry for entry in entries if entry.key not in sections]
    found = _taken(path, shared, known[command], others=[known[name] for name in sections])
    own = sections.get(command)
    return found | (_taken(path, own.value, known[command], others=()) if own is not None else {})


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
    read = [_one(path, entry, flag, value) for value in given]
    return read if several else read[0]


def _one(path: Path, entry: Entry, flag: Flag, value: Any) -> Any:
    """One value as the flag's type; text is never read as a number of another kind, nor a number as a switch."""
    switch = isinstance(value, bool)
    if flag.kind is bool or switch or value is None or isinstance(value, list):
        if flag.kind is bool and switch:
            return value
        raise _wrong(path, entry, _word(flag))
    if flag.kind in (int, float):
        try:
            number = flag.kind(value) if flag.kind is float or isinstance(value, int) else None
        except ValueError:
            number = None
        if number is None or (flag.least is not None and number < flag.least):
            raise _wrong(path, entry, _word(flag))
        if flag.most is not None and number > flag.most:
            raise _wrong(path, entry, _word(flag))
        return number
    text = str(value)
    if flag.choices and text not in flag.choices:
        raise _wrong(path, entry, ", ".join(flag.choices))
    return text


def _word(flag: Flag) -> str:
    said = _WORDS.get(flag.kind, "text")
    if flag.least is not None and flag.most is not None:
        return f"{said} from {flag.least:g} to {flag.most:g}"
    return f"{said}, {flag.least:g} or more" if flag.least is not None else said


def _wrong(path: Path, entry: Entry, expected: str) -> InputError:
    return InputError(f"{path}, line {entry.line}: {entry.key} cannot be {_shown(entry.value)}", expected=expected)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "a section" if _nested(value) else "a list"
    return repr(value) if not isinstance(value, bool) else str(value).lower()


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
        yield Entry(key, _plain(path, value_node), at)


def _plain(path: Path, node: Any) -> Any:
    import yaml

    if isinstance(node, yaml.SequenceNode):
        if any(not isinstance(part, yaml.ScalarNode) for part in node.value):
            raise InputError(
                f"{path}, line {node.start_mark.line + 1}: a list holds plain values", expected="such as [a, b]"
            )
        return [_plain(path, part) for part in node.value]
    value = yaml.SafeLoader("").construct_object(node)
    return value if isinstance(value, (str, int, float)) or value is None else str(node.value)  # dates stay text


def as_yaml(command: str, flags: Sequence[Flag], values: Mapping[str, Any]) -> str:
    """Options in force, as a file that `--config` reads; what is not set, and what is secret, is left out."""
    import yaml

    shown = {flag.name: _written(values[flag.variable]) for flag in flags if not flag.secret}
    kept = {name: value for name, value in shown.items() if value is not None}
    written: str = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=1000)
    return f"# moescope {command}\n{written}"


def _written(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_written(part) for part in value] or None
    return str(value) if isinstance(value, Path) else value
