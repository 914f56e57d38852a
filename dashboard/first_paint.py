"""The document before any script has run: the frame with its names, so that the first look is text; and what it loads.

The grid's scripts are more than half a megabyte, so that only a page that shows a grid loads them.
"""

from __future__ import annotations

import html
import re
from typing import Any

import dash
from flask import request

from moescope.dashboard.navigation import ordered_pages
from moescope.store.store import Store

_TABLE = re.compile(r'<script src="[^"]*/dash_table/[^"]*"></script>\n?')  # Dash's own table, which no page uses
_GRID = re.compile(r'<script src="(?P<address>[^"]*/dash_ag_grid/dash_ag_grid[^"]*)"></script>\n?')

_DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head>
{metas}
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="moescope-grid" content="{grid}">
<title>{title}</title>
{favicon}
{css}
</head>
<body>
<div id="react-entry-point">{shell}</div>
<noscript>moescope's pages are drawn by scripts of this app; allow scripts for this address.</noscript>
<footer>
{config}
{scripts}
{renderer}
</footer>
</body>
</html>"""


def first_paint(app: dash.Dash, store: Store) -> None:
    """Give the app a document that shows its frame at once and loads the grid only where one is shown."""

    def document(**parts: str) -> str:
        scripts = parts["scripts"]
        grid = _GRID.search(scripts)
        return _DOCUMENT.format(
            metas=parts["metas"],
            title=html.escape(parts["title"]),
            favicon=parts["favicon"],
            css=parts["css"],
            config=parts["config"],
            renderer=parts["renderer"],
            scripts=_TABLE.sub("", _GRID.sub("", scripts)),
            grid=grid["address"] if grid else "",
            shell=_shell(store.path.name, request.path),
        )

    options: Any = app
    options.interpolate_index = document


def _shell(store_name: str, path: str) -> str:
    """The frame as plain HTML; the app replaces it as soon as it runs."""
    links, group = [], ""
    for page in ordered_pages():
        if page.group != group:
            group = page.group
            links.append(f'<p class="nav-group">{html.escape(group)}</p>')
        current = ' aria-current="page"' if page.path == path else ""
        letters = f'<span class="nav-letter" aria-hidden="true">{html.escape(page.name[:2])}</span>'
        links.append(
            f'<a class="early-link" href="{html.escape(page.path)}"{current}>{letters}<span>{html.escape(page.name)}</span></a>'
        )
    here = next((page for page in ordered_pages() if page.path == path), None)
    heading = (
        f'<h1 class="page-title">{html.escape(here.name)}</h1><p class="muted">{html.escape(here.subtitle)}</p>'
        if here
        else ""
    )
    return (
        f'<div class="early"><header class="early-header"><span class="brand">moescope</span>'
        f'<span class="muted foreign store-name">{html.escape(store_name)}</span></header>'
        f'<nav class="early-nav">{"".join(links)}</nav>'
        f'<main class="early-main">{heading}<div class="early-block" aria-hidden="true"></div></main></div>'
    )
