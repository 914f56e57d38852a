"""`moescope intervene edits`: the kinds of edits and their fields."""

from __future__ import annotations

from typing import Annotated, Literal

import typer


def edits(
    form: Annotated[Literal["text", "markdown"], typer.Option("--format", help="How to print them.")] = "text",
) -> None:
    """List every kind of edit with its fields.

    Example: moescope intervene edits
    """
    from moescope.edit_page import edits_page

    page = edits_page()
    typer.echo(page if form == "markdown" else page.replace("`", ""), nl=False)
