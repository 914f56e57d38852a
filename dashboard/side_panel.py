"""The panel at the side that holds a card; the page beside it stays in use."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc


def side_panel(identity: str) -> Any:
    """An empty panel; a callback opens it with a title and a card."""
    return dmc.Drawer(
        id=identity,
        position="right",
        size=420,
        withOverlay=False,
        lockScroll=False,
        trapFocus=False,
        closeOnClickOutside=False,
        returnFocus=False,
        keepMounted=True,  # mounted only when opened, its parts would show what they held before callbacks changed them
        padding="md",
        className="detail",
        closeButtonProps={"aria-label": "Close"},
        transitionProps={"duration": 0},
    )
