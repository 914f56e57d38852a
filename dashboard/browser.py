"""Callbacks that run in the browser: the functions of `assets/`, by name."""

from __future__ import annotations

from typing import Any

import dash

HIDDEN: dict[str, Any] = {"aria-hidden": "true"}
"""For glyphs that only repeat the word beside them."""


def in_browser(app: dash.Dash, name: str, *arguments: Any, space: str = "moescope") -> None:
    """Register `dash_clientside.{space}.{name}` with its outputs, inputs and states."""
    app.clientside_callback(dash.ClientsideFunction(space, name), *arguments)  # type: ignore[no-untyped-call]  # of dash


def attributes(**given: str | None) -> dict[str, Any]:
    """Attributes of an element whose names carry dashes: `attributes(data_view="table")` gives `data-view`."""
    return {name.replace("_", "-"): value for name, value in given.items() if value is not None}


def named(text: str) -> dict[str, Any]:
    """The name of a control for those who do not see it."""
    return {"aria-label": text}
