"""One look for every figure: colours that colour-blind readers can tell apart, titles that state n."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from moescope.core.text import undirected

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from numpy.typing import NDArray

    from moescope.core.notebook_figure import NotebookFigure

# Okabe and Ito's palette: nearest pair ΔE 16 or more under protan, deutan and tritan simulation.
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
SEQUENTIAL = "Cividis"
DIVERGING = "PuOr"
CHANCE = "#868e96"
# For cells with text in them: it lets the page through, so that dark text stays legible on it over white, light text over black.
TINT = ((0.0, "rgba(234, 122, 28, 0.05)"), (1.0, "rgba(234, 122, 28, 0.6)"))

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


_BOTTOM = 56


def finish(figure: go.Figure, *, title: str, subtitle: str) -> NotebookFigure:
    """Give a figure the common look, its finding as title and its n as subtitle, and make it one that notebooks keep."""
    from moescope.core.notebook_figure import NotebookFigure

    text = wrapped(plain(title))
    top = 92 + 22 * text.count("<br>") + (20 if _titled_panels(figure) else 0)
    # The plot's height, where the figure has one of its own: the legend stands a constant way below it.
    height = max(80, figure.layout.height - top - _BOTTOM) if figure.layout.height else None
    figure.update_layout(
        template="plotly_white",
        colorway=list(SERIES),
        title={
            "text": text,
            "subtitle": {"text": plain(subtitle), "font": {"size": 12}},
            # From the figure's edge, not the plot's: names along the axis may push that far to the right.
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"l": 16, "t": 32},  # below the tool bar
            "font": {"size": 16},
        },
        font={"family": _FONT, "size": 13},
        margin={"l": 64, "r": 24, "t": top, "b": _BOTTOM},
        hoverlabel={"font": {"family": _FONT}},
        legend={"orientation": "h", "y": -62 / height if height else -0.18, "x": 0},
        separators=".,",
    )
    return NotebookFigure(figure)


def _titled_panels(figure: go.Figure) -> bool:
    """Whether panels have titles of their own over the topmost of them."""
    return any(note.yref == "paper" and note.y is not None and note.y >= 1 for note in figure.layout.annotations)


def heatmap(
    values: NDArray[np.floating[Any]],
    *,
    x: list[str],
    y: list[str],
    hover: str,
    colorbar: str,
    diverging: bool = False,
    customdata: NDArray[Any] | None = None,
) -> go.Figure:
    """A matrix in one look: limits at the 2nd and 98th percentile (symmetric where diverging), gaps left blank.

    Args:
        values: [row, column]; NaN cells stay empty.
        x, y: names of columns and rows.
        hover: Plotly hover template for one cell.
        colorbar: title of the colour bar, with the unit.
        diverging: centre the scale on 0.
        customdata: [row, column, field] values for the hover template.
    """
    import plotly.graph_objects as go

    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, [2, 98]) if finite.size else (0.0, 1.0)
    if diverging:
        high = max(abs(low), abs(high), 1e-9)
        low = -high
    if low == high:
        low, high = low - 0.5, high + 0.5
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=x,
            y=y,
            zmin=float(low),
            zmax=float(high),
            customdata=customdata,
            colorscale=DIVERGING if diverging else SEQUENTIAL,
            zmid=0 if diverging else None,
            colorbar={"title": {"text": colorbar, "side": "right"}, "thickness": 14},
            hovertemplate=hover + "<extra></extra>",
            xgap=1 if len(x) <= 64 else 0,
            ygap=1 if len(x) <= 64 else 0,
        )
    )
    figure.update_xaxes(type="category", nticks=min(len(x), 32))
    figure.update_yaxes(type="category", autorange="reversed")
    figure.update_layout(height=max(260, min(560, 150 + 26 * len(y))))
    return figure


def log_axis(figure: go.Figure, *, title: str, values: Iterable[float]) -> None:
    """A logarithmic y axis whose ticks are written out: powers of ten, with 2 and 5 times them where they fit."""
    shown = [value for value in values if value > 0 and np.isfinite(value)]
    figure.update_yaxes(title=title, type="log")
    if not shown:
        return
    low, high = min(shown), max(shown)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high <= 200 * low else (1,)
    every = max(1, len(powers) // 8)
    ticks = [step * 10.0**power for power in powers if power % every == 0 for step in steps]
    figure.update_yaxes(
        tickvals=ticks, ticktext=[f"{tick:,.10g}" if 1e-3 <= tick < 1e6 else f"{tick:g}" for tick in ticks]
    )


def plain(text: str) -> str:
    """Text from outside as Plotly shows it letter by letter: its labels and titles are a kind of HTML otherwise.

    Characters that turn the direction of writing become U+FFFD, line breaks become spaces.
    """
    text = " ".join(undirected(text).splitlines())
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def wrapped(text: str, width: int = 92) -> str:
    """Break text into lines of about `width` characters, since Plotly does not wrap; text from outside goes through `plain` first."""
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + len(word) >= width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return "<br>".join([*lines, line])
