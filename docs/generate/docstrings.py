"""Docstrings, written as this project writes them, as Markdown."""

from __future__ import annotations

import inspect
import re
import textwrap

_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Examples?|Source|Sources|Shapes|Notes?):[ ]*(.*)$")
_ITEM = re.compile(r"^(\*{0,2}[\w.*, ]{1,80}?)(?: \([^)]*\))?: (.*)$")
_TITLES = {"Args": "Arguments", "Raises": "Errors"}


def as_markdown(docstring: str) -> str:
    """A docstring as paragraphs, lists of what it describes, and its example as a code block.

    Example:
        >>> print(as_markdown("What it does.\\n\\nArgs:\\n    x: a number."))
        What it does.
        <BLANKLINE>
        **Arguments**
        <BLANKLINE>
        - `x`: a number.
    """
    parts: list[str] = []
    title, rest, block = "", "", list[str]()
    for line in [*inspect.cleandoc(docstring).splitlines(), "End:"]:
        found = _SECTION.match(line)
        if not found and line != "End:":
            block.append(line)
            continue
        parts.append(_part(title, rest, block))
        title, rest, block = (found[1], found[2], []) if found else ("", "", [])
    return "\n\n".join(part for part in parts if part)


def _part(title: str, rest: str, block: list[str]) -> str:
    text = textwrap.dedent("\n".join(block)).strip("\n")
    if not title:
        return _paragraphs(text)
    head = f"**{_TITLES.get(title, title)}**"
    if title.startswith("Example"):
        return f"{head}\n\n```pycon\n{text}\n```" if text else ""
    if title in ("Args", "Attributes", "Raises"):
        return f"{head}\n\n{_items(text)}"
    return f"{head}: {_paragraphs(chr(10).join(filter(None, [rest, text])))}"


def _items(text: str) -> str:
    """A list of what is named and described; what is indented goes on with the line before."""
    items: list[str] = []
    for line in text.splitlines():
        found = _ITEM.match(line)
        if found:
            names = ", ".join(f"`{name.strip()}`" for name in found[1].split(","))
            items.append(f"- {names}: {_prose(found[2])}")
        elif line.strip() and items and line[0].isspace():
            items[-1] += f" {_prose(line.strip())}"
        elif line.strip():
            items.append(f"- {_prose(line.strip())}")
    return "\n".join(items)


def _paragraphs(text: str) -> str:
    """Paragraphs; lines indented deeper, or beginning as a doctest does, as code."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.splitlines()
        if not lines:
            continue
        if all(line.startswith("    ") or line.lstrip().startswith(">>>") for line in lines):
            code = textwrap.dedent(paragraph)
            found.append(f"```{'pycon' if '>>>' in code else 'text'}\n{code}\n```")
        else:
            found.append("\n".join(_prose(line) for line in lines))
    return "\n\n".join(found)


def _prose(line: str) -> str:
    """A line of words, with what Markdown would take for its own marks written so that it shows."""
    pieces = re.split(r"(``[^`]+``|`[^`]+`)", line)
    return "".join(p if p.startswith("`") else re.sub(r"([*_\\<>$|\[\]])", r"\\\1", p) for p in pieces)
