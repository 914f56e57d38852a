"""What a page says when it has nothing to show, or something is wrong: always what, why and what to do."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.core.errors import MoescopeError, NotRecordedError
from moescope.dashboard.browser import HIDDEN

RECORD_COMMAND = "moescope profile demo --store {path}"


def empty(title: str, why: str, *, command: str | None = None) -> Any:
    """An empty state: what would be here, why it is not, and the command that fills it."""
    parts = [dmc.Title(title, order=2, className="section-title"), dmc.Text(why, className="muted")]
    if command:
        parts.append(
            dmc.Group(
                [
                    dmc.Code(command, className="command foreign"),
                    dmc.CopyButton(value=command, children="Copy", copiedChildren="Copied", size="xs"),
                ],
                gap="sm",
                justify="center",
            )
        )
    return dmc.Center(dmc.Stack(parts, align="center", gap="sm", maw=640), className="empty", mih=280)


def not_recorded(what: str, why: str, *, command: str | None = None) -> Any:
    """In the place of what a run has no records of: never a stand-in value."""
    return empty(f"Not recorded: {what}", why, command=command)


def read_only(why: str) -> Any:
    """On a page that would write, over a store that is open for reading: why it cannot, and what to do."""
    words = why or "The store is open for reading only: nothing can be recorded or saved from this page."
    return dmc.Alert([html.Span("⊘ ", **HIDDEN), words], color="yellow", variant="light", className="amber foreign")


def refusal(error: MoescopeError) -> Any:
    """What could not be shown, what was found instead and what to do; grey where it only was not recorded."""
    missing = isinstance(error, NotRecordedError)
    lines = [
        f"Expected: {error.expected}." if error.expected else None,
        f"Found: {error.found}." if error.found else None,
        f"What to do: {error.fix}." if error.fix else None,
    ]
    return dmc.Alert(
        dmc.Stack([dmc.Text(line, size="sm", className="foreign") for line in lines if line], gap=2),
        title=_sentence(error.problem),
        color="gray" if missing else "red",
        variant="light",
        className="refusal missing" if missing else "refusal",
    )


def unexpected(error: BaseException) -> Any:
    """A failure that is no one's input: what happened, what still holds and what to do; the details are folded."""
    said = html.Div(f"{type(error).__name__}: {error}"[:2000], className="foreign mono failure-details")
    return dmc.Alert(
        dmc.Stack(
            [
                dmc.Text(
                    "What is on the page is from before, and what you typed is kept. Try again, or reload the page; "
                    "if it happens again, please report it with the details.",
                    size="sm",
                ),
                html.Details([html.Summary("Details"), said]),
            ],
            gap=4,
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


def beside(*notes: str, warning: bool = False) -> Any:
    """What a reader must know about the numbers beside it; long ones are cut, and whole where the numbers are explained.

    Args:
        notes: sentences.
        warning: amber, with a mark: the numbers are not what they would be of a whole run.
    """
    text = " ".join(notes)
    short = text if len(text) <= _NOTE else text[:_NOTE].rsplit(" ", 1)[0] + " … (all under “How to read it”)"
    mark = [html.Span("▲ ", **HIDDEN)] if warning else []
    return html.P([*mark, short], className="note warning foreign" if warning else "note foreign")


_NOTE = 220


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
