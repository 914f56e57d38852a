"""A report as Markdown: tables as tables, figures as links to image files, provenance in a comment at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moescope.core.text import undirected
from moescope.report.document import Answer, Block, Document, Grid, Heading, Paragraph
from moescope.report.figure_data import embedded
from moescope.report.html_page import shown_rows

ROWS = 20
"""Rows of a result's table; Markdown has no boxes that scroll."""
MANIFEST_BEGINS, MANIFEST_ENDS = "<!-- moescope-report ", " -->"
_SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\`*_[]<>|#~"} | {"&": "&amp;"})


def markdown_page(document: Document, images: Mapping[str, str]) -> str:
    """The whole file; `images` are anchor → path of an image beside it."""
    parts = [f"<a id='contents'></a>\n\n{_contents(document.blocks)}"]
    parts += [_block(block, images) for block in document.blocks]
    # Two hyphens would end the comment.
    manifest = embedded(document.manifest).replace("--", "\\u002d\\u002d").replace(">", "\\u003e")
    return "\n\n".join([*parts, f"{MANIFEST_BEGINS}{manifest}{MANIFEST_ENDS}"]) + "\n"


def plain(text: str) -> str:
    """Text from outside, shown letter by letter on one line."""
    return " ".join(undirected(text).split()).translate(_SPECIAL)


def _contents(blocks: Sequence[Block]) -> str:
    lines = []
    for block in blocks:
        if isinstance(block, Heading) and block.level == 1:
            lines.append(f"- [{plain(block.text)}](#{block.anchor})")
        elif isinstance(block, Answer):
            lines.append(f"  - [{plain(block.heading)}](#{block.anchor})")
    return "\n".join(lines)


def _block(block: Block, images: Mapping[str, str]) -> str:
    if isinstance(block, Heading):
        return f"<a id='{block.anchor}'></a>\n\n{'#' * block.level} {plain(block.text)}"
    if isinstance(block, Paragraph):
        return f"**{plain(block.text)}**" if block.tone == "warning" else plain(block.text)
    return _grid(block) if isinstance(block, Grid) else _answer(block, images)


def _grid(grid: Grid) -> str:
    names = ("what", "found") if grid.headless else grid.columns
    rows = []
    for row in grid.rows:
        texts = [
            f"[{plain(c.text)}](#{c.to})" if c.to else f"**{plain(c.text)}**" if c.strong and c.text else plain(c.text)
            for c in row
        ]
        rows.append(texts)  # fmt: skip
    return _table([plain(name) for name in names], rows, [n in grid.numeric for n in range(len(names))])


def _table(names: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> str:
    rule = ["---:" if right else "---" for right in numeric]
    return "\n".join("| " + " | ".join(line) + " |" for line in [names, rule, *rows])


def _answer(answer: Answer, images: Mapping[str, str]) -> str:
    result = answer.result
    parts = [f"<a id='{answer.anchor}'></a>\n\n## {plain(result.title)}", plain(result.subtitle())]
    if image := images.get(answer.anchor):
        parts.append(f"![{plain(result.title)}]({image})")
    parts.append(_table(("what", "found"), [(plain(k), plain(v)) for k, v in result.facts().items()], (False, False)))
    lines, numeric = shown_rows(result, ROWS)
    shown = min(ROWS, result.table.num_rows)
    parts.append(f"Table, {shown:,} of {result.table.num_rows:,} rows:")
    parts.append(_table([plain(t) for t in lines[0]], [[plain(t) for t in line] for line in lines[1:]], numeric))
    return "\n\n".join(parts)
