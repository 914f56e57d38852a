"""`moescope intervene edits`: the kinds of edits and their fields."""

from __future__ import annotations

from typing import Annotated

import typer

from moescope.cli.flags import OUTPUT
from moescope.cli.output import as_json, said
from moescope.core.errors import InputError


def edits(
    format: Annotated[  # noqa: A002  the flag's name
        str, typer.Option(help="On stdout: table, json or markdown.", rich_help_panel=OUTPUT)
    ] = "table",
    json: Annotated[bool, typer.Option("--json", help="The same as --format json.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """List every kind of edit with its fields.

    Example: moescope intervene edits
    """
    known = ("table", "json", "markdown")
    if format not in known:
        raise InputError(f"there is no format {format!r}", expected=", ".join(known))
    if json or format == "json":
        as_json(_listed())
        return
    from moescope.edit_page import edits_page

    page = edits_page()
    said(page if format == "markdown" else page.replace("`", ""), nl=False)


def _listed() -> list[dict[str, object]]:
    """Kinds, what they do, and the type of each field, in words."""
    from moescope.core.edit import edits as known
    from moescope.core.edit_values import field_types

    return [
        {
            "kind": kind.kind,
            "does": (kind.__doc__ or "").split("\n")[0],
            "fields": {name: str(hint).replace("typing.", "") for name, hint in field_types(kind).items()},
        }
        for kind in known
    ]
