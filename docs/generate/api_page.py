"""`docs/api.md`: every public name with its signature and what it says of itself, read from the installed package."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from types import ModuleType
from typing import Any

from docstrings import as_markdown

import moescope as ms
from moescope.core.errors import MoescopeError

HEAD = """# Python

`import moescope as ms` gives {count} names; what they need is loaded when they are first used. `help(ms.record)` shows the same as
this page. All functions take what they work on by position and everything else by name.

| name | what it is |
|---|---|
{table}

`python docs/generate/pages.py api` writes this page anew from the docstrings.
"""
_MODULES = ("edits", "sae")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def api_page() -> str:
    """The page as Markdown."""
    names = sorted(ms.__all__, key=str.lower)
    rows = [f"| [`ms.{name}`](#{anchor(name)}) | {_first_line(getattr(ms, name))} |" for name in names]
    parts = [HEAD.format(count=len(names), table="\n".join(rows))]
    parts += [_entry(name) for name in names if name not in _MODULES]
    parts += [_module(name, getattr(ms, name)) for name in _MODULES]
    return "".join(parts)


def anchor(name: str) -> str:
    """The anchor of a public name's heading."""
    return f"ms{name.lower()}"


def _entry(name: str) -> str:
    value = getattr(ms, name)
    parts = [f"\n## ms.{name}\n", _told(f"ms.{name}", value)]
    if isinstance(value, type) and not issubclass(value, MoescopeError):
        for member, owned in members(value):
            parts.append(f"\n### {name}.{member}\n{_told(f'{name}.{member}', owned)}")
    return "".join(parts)


def _module(name: str, module: ModuleType) -> str:
    parts = [f"\n## ms.{name}\n\n{as_markdown(inspect.getdoc(module) or '')}\n"]
    if name == "edits":
        parts.append("\nEvery kind with its fields stands on [its own page](edits.md).\n")
    listed: list[str] = module.__all__
    for member in listed:
        value = getattr(module, member)
        if getattr(ms, member, None) is value:
            parts.append(f"\n### {name}.{member}\n\nThe same as [`ms.{member}`](#{anchor(member)}).\n")
        else:
            parts.append(f"\n### {name}.{member}\n{_told(f'ms.{name}.{member}', value)}")
    return "".join(parts)


def members(owner: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that a class defines, by name."""
    for name in sorted(vars(owner), key=str.lower):
        value = inspect.getattr_static(owner, name)
        kinds = (property, cached_property, classmethod, staticmethod)
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, kinds)):
            yield name, value


def _told(shown: str, value: Any) -> str:
    docstring = inspect.getdoc(value) or ""
    return f"\n{_signature(shown, value)}{as_markdown(docstring)}\n"


def _signature(shown: str, value: Any) -> str:
    """The call as a code block; a property shows its type."""
    if isinstance(value, property | cached_property):
        getter = value.fget if isinstance(value, property) else value.func
        returned = inspect.signature(getter).return_annotation if getter is not None else "Any"
        return _block(f"{shown}: {_plain(str(returned))}")
    function: Callable[..., Any] = value.__func__ if isinstance(value, classmethod | staticmethod) else value
    if isinstance(value, type) and issubclass(value, MoescopeError):
        function = MoescopeError
    signature = inspect.signature(function)
    given = list(signature.parameters.values())
    if given and given[0].name in ("self", "cls"):
        signature = signature.replace(parameters=given[1:])
    returned = "" if signature.return_annotation is signature.empty else f" -> {signature.return_annotation}"
    arguments = str(signature.replace(return_annotation=signature.empty))
    text = f"{shown}{arguments}{'' if isinstance(value, type) else returned}"
    return _block(_plain(text))


def _block(text: str) -> str:
    """A signature, broken after each comma at the top where it is long."""
    if len(text) > 100 and "(" in text:
        head, _, rest = text.partition("(")
        text = f"{head}(\n    {_broken(rest)}"
    return f"```text\n{text}\n```\n\n"


def _broken(text: str) -> str:
    depth, found = 0, ""
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            found, depth = found + "\n", 1_000
        found += character
        if character == "," and depth == 0:
            found += "\n   "
    return found


def _plain(text: str) -> str:
    """Annotations as they are written, without quotes and module paths."""
    text = re.sub(r": '([^']*)'", r": \1", text)
    text = re.sub(r"-> '([^']*)'", r"-> \1", text)
    text = re.sub(r"\b(?:moescope|typing|collections|pathlib|pandas|torch)\.(?:\w+\.)*(?=[A-Za-z])", "", text)
    return _ADDRESS.sub("", text)


def _first_line(value: Any) -> str:
    return as_markdown((inspect.getdoc(value) or "").partition("\n")[0]).replace("|", "\\|")
