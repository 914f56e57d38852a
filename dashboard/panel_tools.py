"""What every panel offers below its figure: how to read it, the query, the Python, the files."""

from __future__ import annotations

from typing import Any

import dash
from dash import html

from moescope.core.result import Result
from moescope.dashboard.answers import Answers
from moescope.store.store import Store


def tools(identity: str) -> Any:
    """The row of buttons below a panel."""
    return html.Div(className="panel-tools", id={"panel": identity, "part": "tools"})


def table(identity: str, result: Result) -> Any:
    """The table of a result that has no figure."""
    return html.Div(f"{result.table.num_rows} rows", id={"panel": identity, "part": "table"})


def callbacks(app: dash.Dash, store: Store, answers: Answers) -> None:
    """Register what the buttons do."""
