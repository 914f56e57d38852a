"""The registry of dashboard pages: a page is one file with a layout and its callbacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moescope.core.registry import Registry


@dataclass(frozen=True)
class Page:
    """One page of the dashboard.

    Attributes:
        name: shown in the navigation.
        path: its URL path, "/" for the first.
        group: heading in the navigation it stands under.
        order: its place there.
        subtitle: one line under the title.
        layout: builds the page from the state in the URL.
        callbacks: registers the page's callbacks on the app; None where it has none.
        needs_run: whether it shows a run; a page that does not is shown in a store without runs too, with `run=None`.
    """

    name: str
    path: str
    group: str
    order: int
    subtitle: str
    layout: Callable[..., Any]
    callbacks: Callable[..., None] | None = None
    needs_run: bool = True


pages: Registry[Page] = Registry("page", "moescope.dashboard.pages")
