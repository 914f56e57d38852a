"""A report as one HTML file that opens offline: contents at the side, light and dark, figures drawn when they are seen."""

from __future__ import annotations

from collections.abc import Sequence

from moescope.core.html import cell
from moescope.core.result import Result
from moescope.core.text import escaped
from moescope.report.document import Answer, Block, Cell, Document, Grid, Heading, Paragraph
from moescope.report.figure_data import embedded, figure_json, figure_library, templates
from moescope.report.page_style import SCRIPT, STYLE, THEME_SCRIPT

ROWS = 100
"""Rows of a result's table that a report shows."""
MANIFEST = "moescope-report"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'; img-src data: blob:"
"""What the page may load: nothing from anywhere; the figure library is in it, and builds functions."""


def html_page(document: Document) -> str:
    """The whole file."""
    body = "".join(map(_block, document.blocks))
    drawn = any(answer.result.has_figure for answer in document.answers)
    looks = templates()
    library = f"<script type='text/plain' id='figure-library'>{figure_library()}</script>" if drawn else ""
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escaped(document.title)}</title>"
        f"<meta name='viewport' content='width=device-width'>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<style>{STYLE}</style><script>{THEME_SCRIPT}</script></head><body>"
        f"<nav aria-label='Contents'><button id='theme' type='button'>Theme</button>{_contents(document.blocks)}</nav>"
        f"<main>{body}</main>"
        f"<script type='application/json' id='{MANIFEST}'>{embedded(document.manifest)}</script>"
        f"<script type='application/json' id='theme-light'>{looks['light']}</script>"
        f"<script type='application/json' id='theme-dark'>{looks['dark']}</script>{library}"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _contents(blocks: Sequence[Block]) -> str:
    """Headings, and below each its answers."""
    parts, members = [], ""
    for block in blocks:
        if isinstance(block, Heading) and block.level == 1:
            parts.append(f"<li><a href='#{escaped(block.anchor)}'>{escaped(block.text)}</a>\0</li>")
            if len(parts) > 1:
                parts[-2] = parts[-2].replace("\0", f"<ul>{members}</ul>" if members else "")
            members = ""
        elif isinstance(block, Answer):
            members += f"<li><a href='#{escaped(block.anchor)}'>{escaped(block.heading)}</a></li>"
    if parts:
        parts[-1] = parts[-1].replace("\0", f"<ul>{members}</ul>" if members else "")
    return f"<details open><summary>Contents</summary><ul>{''.join(parts)}</ul></details>"


def _block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level} id='{escaped(block.anchor)}'>{escaped(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        kind = "" if block.tone == "plain" else f" class='{block.tone}'"
        return f"<p{kind}>{escaped(block.text)}</p>"
    return _grid(block) if isinstance(block, Grid) else _answer(block)


def _grid(grid: Grid) -> str:
    if grid.headless:
        rows = "".join(f"<tr><th>{escaped(row[0].text)}</th>{_cell(row[1], False)}</tr>" for row in grid.rows)
        return f"<table class='facts'><tbody>{rows}</tbody></table>"
    names = "".join(
        f"<th{_number(number in grid.numeric)}>"
        + (f"<button type='button'>{escaped(name)}</button>" if grid.sortable else escaped(name))
        + "</th>"
        for number, name in enumerate(grid.columns)
    )
    rows = "".join(
        "<tr>" + "".join(_cell(one, number in grid.numeric) for number, one in enumerate(row)) + "</tr>"
        for row in grid.rows
    )
    kind = " class='sortable'" if grid.sortable else ""
    return f"<div class='wide'><table{kind}><thead><tr>{names}</tr></thead><tbody>{rows}</tbody></table></div>"


def _cell(one: Cell, numeric: bool) -> str:
    text = escaped(one.text)
    text = f"<a href='#{escaped(one.to)}'>{text}</a>" if one.to else text
    text = f"<b>{text}</b>" if one.strong else text
    order = "" if one.order is None or one.order != one.order else f" data-v='{one.order!r}'"
    return f"<td{_number(numeric)}{order}>{text}</td>"


def _number(numeric: bool) -> str:
    return " class=n" if numeric else ""


def _answer(answer: Answer) -> str:
    result, anchor = answer.result, escaped(answer.anchor)
    parts = [
        f"<section id='{anchor}'><h2>{escaped(result.title)}</h2>",
        f"<p class='muted'>{escaped(result.subtitle())}</p>",
    ]
    if result.has_figure:
        data = figure_json(result)
        height = result.figure(titled=False).layout.height or 450
        parts.append(
            f"<div class='figure' data-figure='figure-{anchor}' style='height:{int(height)}px'></div>"
            f"<script type='application/json' id='figure-{anchor}'>{data}</script>"
        )
    facts = "".join(f"<tr><th>{escaped(k)}</th><td>{escaped(v)}</td></tr>" for k, v in result.facts().items())
    parts.append(f"<table class='facts'><tbody>{facts}</tbody></table>")
    shown = min(ROWS, result.table.num_rows)
    opened = "" if result.has_figure else " open"
    parts.append(
        f"<details{opened}><summary>Table, {shown:,} of {result.table.num_rows:,} rows</summary>"
        f"<div class='scroll'>{result_table(result)}</div></details>"
    )
    if result.sql:
        parts.append(f"<details><summary>Query</summary><pre>{escaped(result.sql.strip())}</pre></details>")
    return "".join(parts) + "</section>"


def result_table(result: Result) -> str:
    """The first rows of a result's table, numbers to the right."""
    head, numeric = shown_rows(result, ROWS)
    names = "".join(f"<th{_number(n)}>{escaped(name)}</th>" for n, name in zip(numeric, head[0], strict=True))
    body = "".join(
        "<tr>"
        + "".join(f"<td{_number(n)}>{escaped(text)}</td>" for n, text in zip(numeric, row, strict=True))
        + "</tr>"
        for row in head[1:]
    )
    return f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"


def shown_rows(result: Result, rows: int) -> tuple[list[list[str]], list[bool]]:
    """Column names and the first rows as text, and which columns are numbers."""
    import pyarrow as pa

    head = result.table.slice(0, rows)
    numeric = [pa.types.is_integer(f.type) or pa.types.is_floating(f.type) for f in head.schema]
    return [list(head.column_names), *([cell(value) for value in row.values()] for row in head.to_pylist())], numeric
