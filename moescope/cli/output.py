"""What commands write: data to stdout, as tables or JSON; news to stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import typer

from moescope.core.json_data import to_json


@contextmanager
def _reader() -> Iterator[None]:
    """Where the reader of our output leaves early, as `head` does, that is its right: stop without an error."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at its end
        raise typer.Exit(0) from None


def said(text: str, *, nl: bool = True) -> None:
    """Print text to stdout."""
    with _reader():
        typer.echo(text, nl=nl)


def as_json(data: Any) -> None:
    """Print data as JSON to stdout."""
    said(to_json(data, indent=1))


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows as a table to stdout; numbers to the right, control characters shown as U+FFFD."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[number], (int, float)) for row in rows)
        drawn.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(_shown(value)) for value in row))  # Text, because a plain str may hold rich's markup
    with _reader():
        Console().print(drawn)


def facts(pairs: Mapping[str, Any]) -> None:
    """Print label and value a line to stdout."""
    width = max(map(len, pairs))
    with _reader():
        for label, value in pairs.items():
            typer.echo(f"{label:<{width}}  {_shown(value)}")


def _shown(value: Any) -> str:
    return printable(f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))


def news(text: str) -> None:
    """Say something on stderr."""
    typer.echo(printable(text), err=True)


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters become U+FFFD."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
