"""HTML of objects in a notebook: no script, no colours of its own, every word from outside escaped.

Colours are the notebook's, so that all of it is legible in light and dark ones. Alignment is written beside each cell, since
viewers of notebooks drop style sheets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moescope.core.html import cell
from moescope.core.text import escaped, whole_characters

if TYPE_CHECKING:
    from moescope.core.result import Result

_ROWS = 10
_LONGEST = 300


def box(*parts: str) -> str:
    """Parts of one object's display."""
    return f"<div>{''.join(parts)}</div>"


def heading(text: str, *lines: str) -> str:
    """What it is, and lines of facts below."""
    below = "".join(f"<p>{written(line)}</p>" for line in lines if line)
    return f"<h4>{written(text)}</h4>{below}"


def grid(rows: Iterable[Sequence[Any]], columns: Sequence[str] = (), *, numbers: Iterable[str] = ()) -> str:
    """A table of values, numbers on the right.

    Args:
        rows: cells of each row, in the order of the columns.
        columns: their names; none for a table without a head.
        numbers: columns that stand on the right with their name.
    """
    right = set(numbers)
    listed = [list(row) for row in rows]
    head = "".join(_cell("th", name, right=name in right) for name in columns)
    body = "".join(
        "<tr>"
        + "".join(
            _cell("td", value, right=index < len(columns) and columns[index] in right)
            for index, value in enumerate(row)
        )
        + "</tr>"
        for row in listed
    )
    return f"<table>{f'<thead><tr>{head}</tr></thead>' if columns else ''}<tbody>{body}</tbody></table>"


def facts(pairs: Mapping[str, Any]) -> str:
    """Label and text, a row each; what is empty is left out."""
    rows = "".join(
        f"<tr>{_cell('th', label)}{_cell('td', value)}</tr>"
        for label, value in pairs.items()
        if value not in (None, "")
    )
    return f"<table><tbody>{rows}</tbody></table>"


def folded(label: str, inside: str) -> str:
    """Something to open on a click; opened where the viewer knows no such thing."""
    return f"<details><summary>{written(label)}</summary>{inside}</details>"


def first_rows(result: Result, rows: int = _ROWS) -> str:
    """The first rows of a result's table, and how many there are."""
    import pyarrow as pa

    head, total = result.table.slice(0, rows), result.table.num_rows
    numbers = [f.name for f in head.schema if pa.types.is_integer(f.type) or pa.types.is_floating(f.type)]
    shown = grid((row.values() for row in head.to_pylist()), head.schema.names, numbers=numbers)
    more = f"<p>{head.num_rows:,} of {total:,} rows; <code>.df()</code> has them all.</p>" if total > rows else ""
    return shown + more


def written(value: Any) -> str:
    """A value as text for HTML, cut where it is very long."""
    text = whole_characters(cell(value))
    return escaped(text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…")


def _cell(tag: str, value: Any, *, right: bool = False) -> str:
    return f'<{tag} style="text-align:{"right" if right else "left"}">{written(value)}</{tag}>'
