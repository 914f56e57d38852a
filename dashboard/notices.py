"""What a page says when it has nothing to show, or something is wrong: always what, why and what to do."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.core.errors import MoescopeError
from moescope.dashboard.browser import HIDDEN

RECORD_COMMAND = "moescope profile demo --store {path}"


def empty(title: str, why: str, *, command: str | None = None) -> Any:
    """An empty state: what would be here, why it is not, and the command that fills it."""
    parts = [dmc.Title(title, order=2, className="section-title"), dmc.Text(why, className="muted")]
    if command:
        parts.append(
            dmc.Group(
                [
                    dmc.Code(command, className="command"),
                    dmc.CopyButton(value=command, children="Copy", copiedChildren="Copied", size="xs"),
                ],
                gap="sm",
                justify="center",
            )
        )
    return dmc.Center(dmc.Stack(parts, align="center", gap="sm", maw=640), className="empty", mih=280)


def refusal(error: MoescopeError) -> Any:
    """What could not be shown, what was found instead and what to do."""
    lines = [
        f"Expected: {error.expected}." if error.expected else None,
        f"Found: {error.found}." if error.found else None,
        f"What to do: {error.fix}." if error.fix else None,
    ]
    return dmc.Alert(
        dmc.Stack([dmc.Text(line, size="sm", className="foreign") for line in lines if line], gap=2),
        title=_sentence(error.problem),
        color="red",
        variant="light",
        className="refusal",
    )


def unexpected(error: Exception) -> Any:
    """A failure that is no one's input: what happened, what still holds and what to do."""
    return dmc.Alert(
        dmc.Stack(
            [
                dmc.Text(
                    "What is on the page is from before. Reload the page; if it happens again, please report it.",
                    size="sm",
                ),
                dmc.Text(f"{type(error).__name__}: {error}"[:400], size="sm", className="foreign mono"),
            ],
            gap=2,
        ),
        title="This view could not be made",
        color="red",
        variant="light",
        className="refusal",
    )


def incomplete(name: str, status: str, ledger: str) -> Any:
    """The bar over every page of a run that is not complete."""
    words = [
        html.Span("▲ ", **HIDDEN),
        f"{status} run: ",
        html.Span(name, className="foreign strong"),
        ". Numbers on this page rest on part of what the run should hold. ",
        dmc.Anchor("See the coverage ledger", href=ledger, size="sm", className="on-amber"),
    ]
    return dmc.Alert(html.Div(words), color="yellow", variant="light", className="amber", id="incomplete-bar")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
