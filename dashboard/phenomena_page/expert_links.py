"""Names of experts in text, as links to their cards."""

from __future__ import annotations

import re
from typing import Any

import dash_mantine_components as dmc

from moescope.dashboard.url_state import Layer, ViewState, link

_NAME = re.compile(r"(L(\d+)(?: ([a-z]+(?:\.\d+)?))?·E(\d+))", re.ASCII)


def expert_href(run: str, layer: Layer, expert: int) -> str:
    """The address of an expert's card."""
    return link("/experts", ViewState(run=run, layer=layer, expert=expert))


def linked_experts(text: str, run: str) -> list[Any]:
    """Text with every name of an expert as a link to its card."""
    parts: list[Any] = []
    at = 0
    for found in _NAME.finditer(text):
        href = expert_href(run, Layer(int(found[2]), found[3]), int(found[4]))
        parts += [text[at : found.start()], dmc.Anchor(found[1], href=href, size="sm")]
        at = found.end()
    return [part for part in (*parts, text[at:]) if part != ""]
