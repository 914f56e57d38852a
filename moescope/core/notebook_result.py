"""A result as the last line of a cell: the finding, its figure, the first rows of its table, and how to read it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from moescope.core.kernel import in_notebook
from moescope.core.notebook_html import facts, first_rows, folded, heading
from moescope.core.text import printable, whole_characters

if TYPE_CHECKING:
    from moescope.core.result import Result

_LINES = 8
_WIDTH = 118
_BRIEF = 90


def show(result: Result) -> None:
    """Display a result in a notebook, in three parts: the finding, the figure, the numbers.

    Each part is of the kind that viewers show best: the figure is a picture wherever it cannot be drawn anew.

    Raises:
        NotImplementedError: there is no notebook, or no figure: the plain displays do.
    """
    if not in_notebook() or not result.has_figure:
        raise NotImplementedError
    import IPython.display

    words = str(result)
    display: Any = IPython.display.display  # it has no types
    display({"text/html": f"<div>{head(result)}</div>", "text/plain": words}, raw=True)
    display(result.figure(titled=False))
    display({"text/html": f"<div>{rest(result)}</div>", "text/plain": ""}, raw=True)


def head(result: Result) -> str:
    """The finding, and what stands behind it."""
    return heading(result.title, result.subtitle(), bounds(result))


def rest(result: Result) -> str:
    """The first rows, and what a reader must know to judge them."""
    return first_rows(result) + folded("How to read this", facts(result.facts()))


def bounds(result: Result) -> str:
    """What its intervals and its chance level are, each in a few words; the whole of it stands under how to read it."""
    told = {"Interval": result.interval, "Chance level": result.null}
    return " · ".join(f"{label}: {_briefly(text)}" for label, text in told.items() if text)


def _briefly(text: str) -> str:
    first = re.split(r"[;.] ", text, maxsplit=1)[0]
    return first if len(first) <= _BRIEF else first[: first.rfind(" ", 0, _BRIEF)] + " …"


def as_text(result: Result) -> str:
    """The same in plain text: finding, facts, and as many rows as fit above the next prompt."""
    lines = [
        f"{result.name}: {result.title}" if result.name else result.title,
        f"{result.subtitle()}, {result.table.num_rows:,} rows",
    ]
    lines += [bounds(result)] if bounds(result) else []
    if result.table.num_rows:
        lines.append(_rows(result))
    reached = (
        ".df() has all rows" + (", .figure() draws it" if result.has_figure else "") + ", .definition says what it is"
    )
    return printable(whole_characters("\n".join([*lines, reached])))


def _rows(result: Result) -> str:
    """The first rows, without the last columns where all are wider than a screen."""
    frame = result.table.slice(0, _LINES).to_pandas()
    kept = len(frame.columns)
    while True:
        text: str = frame.iloc[:, :kept].to_string(index=False, float_format=lambda x: f"{x:.4g}", max_colwidth=32)
        if kept <= 1 or max(map(len, text.splitlines())) <= _WIDTH:
            break
        kept -= 1
    left_out = ", ".join(map(str, frame.columns[kept:]))
    return text + (f"\nand columns {left_out}" if left_out else "")
