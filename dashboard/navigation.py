"""The navigation: groups of pages, each with two letters that tell it apart when narrow, and a key."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.core.pages import Page, pages
from moescope.core.versions import VERSION
from moescope.dashboard.browser import HIDDEN

GROUPS = ("Run", "Routing", "Inside", "Change")


def ordered_pages() -> list[Page]:
    """All pages as the navigation shows them."""
    return sorted(
        pages, key=lambda page: (GROUPS.index(page.group) if page.group in GROUPS else len(GROUPS), page.order)
    )


def page_keys() -> dict[str, str]:
    """The letter after `g` that opens a page, by path: the first letter of its name that no page before it has."""
    taken: dict[str, str] = {}
    for page in ordered_pages():
        letters = [letter for letter in page.name.lower() if letter.isalpha() and letter not in taken.values()]
        taken[page.path] = letters[0] if letters else ""
    return taken


def navigation() -> list[Any]:
    """Links to all pages; the browser keeps what is selected in them, and marks the page that is open."""
    keys = page_keys()
    shown: list[Any] = []
    for group in dict.fromkeys(page.group for page in ordered_pages()):
        members = [page for page in ordered_pages() if page.group == group]
        shown.append(dmc.Text(group, className="nav-group", id=f"nav-{group.lower()}"))
        shown.append(html.Ul([html.Li(_link(page, keys[page.path])) for page in members], className="nav-list"))
    return [html.Div(shown), dmc.Text(f"moescope {VERSION}", className="nav-foot")]


def _link(page: Page, key: str) -> Any:
    return dmc.NavLink(
        id={"nav": page.path},
        label=page.name,
        href=page.path,
        className="nav-link",
        attributes={"root": {"title": f"{page.name}: {page.subtitle} (g {key})", "aria-label": page.name}},
        leftSection=html.Span(page.name[:2], className="nav-letter", **HIDDEN),
    )
