"""A simple chart of any result, in the look of every other figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pyarrow as pa

from moescope.core.errors import InputError
from moescope.core.figures import CHANCE, SEQUENTIAL, SERIES, heatmap, plain
from moescope.core.result import Result
from moescope.dashboard.sql.outcome import Outcome

if TYPE_CHECKING:
    import plotly.graph_objects as go

Drawing = Literal["bar", "line", "scatter", "heat"]
DRAWINGS: tuple[Drawing, ...] = get_args(Drawing)
_CELLS = 200_000
_MARKS = 5_000  # bars that can still be told apart, and drawn


@dataclass(frozen=True)
class Choice:
    """What is drawn: its kind, and the columns across, up and for the colour; "" for the page's own choice or none."""

    kind: Drawing
    x: str = ""
    y: str = ""
    z: str = ""


def chart_of(outcome: Outcome, choice: Choice, *, sql: str) -> Result:
    """The rows of a query as one figure.

    Args:
        outcome: what the query gave.
        choice: the kind of drawing and its columns.
        sql: the query.

    Raises:
        InputError: no rows, no column of that name, or nothing to measure in one that must be a number.
    """
    if not outcome.rows:
        raise InputError("the query gave no rows, so there is nothing to draw")
    x, y, z = completed(outcome, choice)
    names = [name for name in dict.fromkeys((x, y, z)) if name]
    values = {name: _values(outcome, name) for name in names}
    measured = z if choice.kind == "heat" else y
    if all(_number(value) is None for value in values[measured]):
        raise InputError(f"the column {measured} holds no numbers", fix="choose another column")
    if choice.kind == "bar" and len(outcome.rows) > _MARKS:
        raise InputError(
            f"{len(outcome.rows):,} bars cannot be told apart",
            expected=f"at most {_MARKS:,}",
            fix="aggregate, or draw a scatter",
        )
    part = "the first rows of more" if outcome.more else "rows of the query"
    draw = {"bar": _bars, "line": _lines, "scatter": _points, "heat": _heat}[choice.kind]
    return Result(
        title=f"{z} by {x} and {y}" if choice.kind == "heat" else f"{y} by {x}",
        table=pa.table({name: pa.array(column) for name, column in _even(values).items()}),
        definition="The rows of the query, as they are.",
        units={},
        n=len(outcome.rows),
        n_unit=part,
        draw=lambda _result: draw(values, x, y, z),
        sql=sql,
    )


def completed(outcome: Outcome, choice: Choice) -> tuple[str, str, str]:
    """The columns of a chart: those chosen, else the first that fit."""
    names = [column.name for column in outcome.columns]
    for name in (choice.x, choice.y, choice.z):
        if name and name not in names:
            raise InputError(
                f"the result has no column {name!r}", expected=", ".join(names[:20]), fix="choose one of these"
            )
    numbers = [c.name for c in outcome.columns if c.kind in ("whole", "number")]
    x = choice.x or names[0]
    if choice.kind == "heat":
        y = choice.y or next((name for name in names if name != x), x)
        return x, y, choice.z or next((name for name in reversed(numbers) if name not in (x, y)), y)
    return x, choice.y or next((name for name in reversed(numbers) if name != x), x), choice.z


def _bars(values: dict[str, list[Any]], x: str, y: str, z: str) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, colour, places in _series(values, z):
        figure.add_bar(
            x=[_label(values[x][i]) for i in places], y=_numbers(values[y], places), name=name, marker_color=colour
        )
    return _named(figure, x, y)


def _lines(values: dict[str, list[Any]], x: str, y: str, z: str) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, colour, members in _series(values, z):
        ordered = all(_number(values[x][i]) is not None for i in members)
        places = sorted(members, key=lambda i: float(values[x][i])) if ordered else members
        figure.add_scatter(
            x=[_label(values[x][i]) for i in places],
            y=_numbers(values[y], places),
            name=name,
            mode="lines+markers" if len(places) <= 100 else "lines",
            line_color=colour,
        )
    return _named(figure, x, y)


def _points(values: dict[str, list[Any]], x: str, y: str, z: str) -> go.Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    numbers = z != "" and all(value is None or _number(value) is not None for value in values[z])
    for name, colour, places in _series(values, "" if numbers else z):
        marker: dict[str, Any] = {"size": 6, "opacity": 0.75, "color": colour}
        if numbers:
            scale = {
                "colorscale": SEQUENTIAL,
                "showscale": True,
                "colorbar": {"title": {"text": plain(z), "side": "right"}},
            }
            marker |= {"color": _numbers(values[z], places), **scale}
        figure.add_scatter(
            x=[_label(values[x][i]) for i in places],
            y=_numbers(values[y], places),
            name=name,
            mode="markers",
            marker=marker,
        )
    return _named(figure, x, y)


def _heat(values: dict[str, list[Any]], x: str, y: str, z: str) -> go.Figure:
    across, up = _distinct(values[x]), _distinct(values[y])
    if len(across) * len(up) > _CELLS:
        raise InputError(f"{len(across):,} × {len(up):,} cells are too many", expected=f"at most {_CELLS:,}")
    place_x, place_y = ({value: i for i, value in enumerate(distinct)} for distinct in (across, up))
    matrix = np.full((len(up), len(across)), np.nan)
    for column, row, value in zip(values[x], values[y], values[z], strict=True):
        number = _number(value)
        if number is not None:
            if not np.isnan(matrix[place_y[row], place_x[column]]):
                raise InputError(
                    f"{x} and {y} name some cells twice",
                    fix="aggregate in the query, so that each pair stands in one row",
                )
            matrix[place_y[row], place_x[column]] = number
    figure = heatmap(
        matrix,
        x=[str(_label(value)) for value in across],
        y=[str(_label(value)) for value in up],
        hover=f"{plain(x)} %{{x}} · {plain(y)} %{{y}}<br>{plain(z)} %{{z}}",
        colorbar=plain(z),
    )
    figure.update_xaxes(title=plain(x))
    figure.update_yaxes(title=plain(y))
    return figure


def _series(values: dict[str, list[Any]], z: str) -> list[tuple[str, str, list[int]]]:
    """Rows by the value that colours them: at most seven colours, the rest together in grey."""
    everything = list(range(len(next(iter(values.values())))))
    if not z:
        return [("", SERIES[0], everything)]
    groups: dict[Any, list[int]] = {}
    for i in everything:
        groups.setdefault(values[z][i], []).append(i)
    largest = sorted(groups, key=lambda value: -len(groups[value]))
    shown = largest if len(largest) <= len(SERIES) else largest[: len(SERIES) - 1]
    series = [(str(_label(value)), SERIES[i], groups[value]) for i, value in enumerate(shown)]
    if rest := [i for value in largest[len(shown) :] for i in groups[value]]:
        series.append((f"{len(largest) - len(shown)} others", CHANCE, sorted(rest)))
    return series


def _named(figure: go.Figure, x: str, y: str) -> go.Figure:
    figure.update_xaxes(title=plain(x))
    figure.update_yaxes(title=plain(y))
    figure.update_layout(height=380, showlegend=len(figure.data) > 1)
    return figure


def _values(outcome: Outcome, name: str) -> list[Any]:
    place = [column.name for column in outcome.columns].index(name)
    return [row[place] for row in outcome.rows]


def _distinct(values: Sequence[Any]) -> list[Any]:
    """Values once each: numbers by size, everything else as it comes."""
    distinct = list(dict.fromkeys(values))
    return sorted(distinct, key=float) if all(_number(value) is not None for value in distinct) else distinct


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _numbers(values: Sequence[Any], places: Sequence[int]) -> list[float | None]:
    return [_number(values[i]) for i in places]


def _label(value: Any) -> Any:
    if value is None:
        return "—"
    return value if _number(value) is not None else plain(str(value))[:80]


def _even(values: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Columns of one type each: where numbers and texts are mixed (a NaN is text on a page), all are text."""
    return {
        name: column
        if len({type(v) for v in column if v is not None}) <= 1
        else [None if v is None else str(v) for v in column]
        for name, column in values.items()
    }
