"""The table of contents, read from the lists of links in the pages called `index.md`.

A page of links reads well on a code host, where a directive would show as code. Here every link of a list of such a page, to
another page, becomes an entry of the contents under the heading it stands below.
"""

from __future__ import annotations

import re
from typing import Any

_HEADING = re.compile(r"##+ (.+)")
_ENTRY = re.compile(r"\s*(?:[-*]|\d+\.) .*?\]\((?!https?:)([^)#\s]+?)\.(?:md|ipynb)\)")


def contents(text: str, *, captions: bool) -> str:
    """The contents of a page of links, as directives to stand at its end; empty where it has none, or has its own.

    Args:
        text: the page, as Markdown.
        captions: name each part by its heading; otherwise all is one list.

    Example:
        >>> print(contents("# All\\n\\n## First\\n\\n- [Start](start.md): begin here\\n", captions=True).strip())
        ```{toctree}
        :hidden:
        :caption: First
        <BLANKLINE>
        start
        ```
    """
    if "{toctree}" in text:
        return ""
    parts: dict[str, list[str]] = {}
    heading = ""
    for line in text.splitlines():
        if found := _HEADING.match(line):
            heading = found[1] if captions else ""
        elif (entry := _ENTRY.match(line)) and entry[1] not in parts.get(heading, ()):
            parts.setdefault(heading, []).append(entry[1])
    return "".join(_directive(caption, pages) for caption, pages in parts.items())


def _directive(caption: str, pages: list[str]) -> str:
    options = [":hidden:", *([f":caption: {caption}"] if caption else [])]
    return "\n".join(["", "", "```{toctree}", *options, "", *pages, "```", ""])


def _add(app: Any, page: str, source: list[str]) -> None:
    if (page == "index" or page.endswith("/index")) and str(app.env.doc2path(page)).endswith(".md"):
        source[0] += contents(source[0], captions=page == "index")


def setup(app: Any) -> dict[str, Any]:
    """Add them while pages are read; Sphinx calls this."""
    app.connect("source-read", _add)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
