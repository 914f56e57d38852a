"""What commands write: data to stdout, as tables or JSON; news to stderr."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import typer

from moescope.core.json_data import to_json


def as_json(data: Any) -> None:
    """Print data as JSON to stdout."""
    typer.echo(to_json(data, indent=1))


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows as a table to stdout; numbers to the right, control characters shown as U+FFFD."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[number], (int, float)) for row in rows)
        drawn.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(printable(f"{v:,}" if isinstance(v, int) and not isinstance(v, bool) else str(v)) for v in row))
    Console().print(drawn)


def facts(pairs: Mapping[str, Any]) -> None:
    """Print label and value a line to stdout."""
    width = max(map(len, pairs))
    for label, value in pairs.items():
        typer.echo(f"{label:<{width}}  {printable(f'{value:,}' if isinstance(value, int) else str(value))}")


def news(text: str) -> None:
    """Say something on stderr."""
    typer.echo(printable(text), err=True)


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters become U+FFFD."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
