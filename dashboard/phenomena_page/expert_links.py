"""Names of experts in text, as links to their cards."""

from __future__ import annotations

import re
from typing import Any

import dash_mantine_components as dmc

from moescope.dashboard.url_state import Layer, ViewState, link

_NAME = re.compile(r"(L(\d+)(?: ([a-z]+(?:\.\d+)?))?·E(\d+))", re.ASCII)


def expert_place(name: str) -> tuple[Layer, int] | None:
    """Layer and expert of a name such as `L1·E10`; None where it is none.

    Example:
        >>> expert_place("L1 attn·E10")
        (Layer(number=1, block='attn'), 10)
    """
    found = _NAME.fullmatch(name)
    return None if found is None else (Layer(int(found[2]), found[3]), int(found[4]))


def expert_href(run: str, layer: Layer, expert: int) -> str:
    """The address of an expert's card."""
    return link("/experts", ViewState(run=run, layer=layer, expert=expert))


def linked_experts(text: str, run: str) -> list[Any]:
    """Text with every name of an expert as a link to its card."""
    parts: list[Any] = []
    at = 0
    for found in _NAME.finditer(text):
        place = Layer(int(found[2]), found[3]), int(found[4])
        parts += [text[at : found.start()], dmc.Anchor(found[1], href=expert_href(run, *place), size="sm")]
        at = found.end()
    return [part for part in (*parts, text[at:]) if part != ""]
