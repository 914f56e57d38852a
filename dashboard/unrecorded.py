"""The place of something that a run does not hold: what it would show, and the command that fills it."""

from __future__ import annotations

import shlex
from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.store.run import Run


def unrecorded(title: str, shows: str, command: str | None = None, *, why: str = "Not recorded") -> Any:
    """A short empty state inside a page that has other things to show.

    Args:
        title: what would be here.
        shows: what one would see, as a sentence or two.
        command: what fills it, to be copied.
        why: why it is not here.
    """
    parts: list[Any] = [
        html.Div([html.Strong(title), html.Span(f" · {why}", className="muted")]),
        dmc.Text(shows, className="muted"),
    ]
    if command:
        parts.append(copied(command))
    return dmc.Stack(parts, gap=4, className="unrecorded")


def copied(command: str) -> Any:
    """A command with a button that copies it."""
    return dmc.Group(
        [
            dmc.Code(command, className="command foreign"),
            dmc.CopyButton(value=command, children="Copy", copiedChildren="Copied", size="xs"),
        ],
        gap="sm",
    )


def command(run: Run, words: str, *, model: bool = False) -> str:
    """A command of moescope on the store of a run, each part quoted for the shell.

    Args:
        run: whose store it writes to.
        words: the command after `moescope`, with `{model}` for the run's model and `{run}` for its name.
        model: whether the run's model is among them; a folder or file that is named is quoted too.
    """
    filled = words.format(model=shlex.quote(run.model) if model else "", run=shlex.quote(run.name))
    return f"moescope {filled} --store {shlex.quote(str(run.store.path))}"


def quoted(name: str) -> str:
    """A name for the words of a `command`: quoted for the shell, its braces doubled."""
    return shlex.quote(name).replace("{", "{{").replace("}", "}}")
