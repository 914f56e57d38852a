"""Pieces of expert cards: small tables, intervals, links from an expert's name to its card."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.core.errors import MoescopeError
from moescope.dashboard import numbers
from moescope.dashboard.records import Router, expert_name, layer_of
from moescope.dashboard.url_state import ViewState, link

Row = list[Any]


def small_table(names: list[str], rows: list[Row], *, left: int = 1, name: str | None = None) -> Any:
    """A table whose first `left` columns are text and the others numbers."""
    head = dmc.TableTr([dmc.TableTh(n, className="" if i < left else "number") for i, n in enumerate(names)])
    body = [
        dmc.TableTr([dmc.TableTd(cell, className="foreign" if i < left else "number") for i, cell in enumerate(row)])
        for row in rows
    ]
    table = dmc.Table(
        [dmc.TableThead(head), dmc.TableTbody(body)],
        className="small-table",
        verticalSpacing=3,
        horizontalSpacing=6,
        attributes={"root": {"aria-label": name}} if name else None,
    )
    return dmc.Box(table, className="card-table")


def expert_link(router: Router, known: list[Router], expert: int, here: ViewState, *, words: str | None = None) -> Any:
    """The name of an expert, leading to its card."""
    state = here.but(layer=layer_of(router, known), expert=expert, token=None)
    return dmc.Anchor(words or expert_name(expert), href=link("/experts", state), size="sm")


def tokens_link(words: str, state: ViewState) -> Any:
    """A count, leading to its tokens."""
    return dmc.Anchor(words, href=link("/tokens", state), size="sm")


def with_interval(
    value: float | None, low: float | None, high: float | None, *, percent: bool = False, whole: bool = False
) -> str:
    """A number with its bounds, where it has some; in percent, or as a whole number.

    Example:
        >>> with_interval(0.4, 0.38, 0.42, percent=True), with_interval(1.5, None, None)
        ('40.0 % [38.0, 42.0]', '1.500')
    """
    if percent:
        told = numbers.share(value, 1)
        bounds = [numbers.MISSING if numbers.absent(part) else f"{100 * (part or 0.0):.1f}" for part in (low, high)]
    else:
        told, *bounds = (numbers.count(part) if whole else figure(part) for part in (value, low, high))
    return told if numbers.MISSING in bounds else f"{told} [{bounds[0]}, {bounds[1]}]"


def counted(told: str, basis: Any) -> Any:
    """A number with what it rests on below it."""
    return html.Div([html.Div(told), html.Div(basis, className="soft")])


def figure(value: float | None) -> str:
    """A number of any size: three decimals, or four digits where it is small or large.

    Example:
        >>> figure(0.25), figure(12345.6), figure(-0.00012)
        ('0.250', '12,346', '−0.00012')
    """
    if value is None or numbers.absent(value):
        return numbers.MISSING
    if abs(value) >= 1000:
        return numbers.decimal(value, 0)
    if value == 0 or abs(value) >= 0.01:
        return numbers.decimal(value)
    return f"{value:.2g}".replace("-", "−")


def quiet(text: str) -> Any:
    """A remark."""
    return dmc.Text(text, className="muted foreign")


def reason(error: MoescopeError) -> Any:
    """Why a part has nothing, and what would fill it."""
    problem = "not recorded for this run" if " needs records that run " in error.problem else error.problem
    lines = [problem, *([f"What to do: {error.fix}."] if error.fix else [])]
    return dmc.Stack([quiet(line[:1].upper() + line[1:]) for line in lines], gap=2)
