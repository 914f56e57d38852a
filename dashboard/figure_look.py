"""A result's figure on a page: the page's own background and ink, in light and dark."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go

_CLEAR = "rgba(0,0,0,0)"

GRAPH: Any = {
    "displaylogo": False,
    "displayModeBar": "hover",
    # The server that Plotly would send figures to is never asked: what is shown stays on this machine.
    "plotlyServerURL": "",
    "showSendToCloud": False,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "toImage", "sendDataToCloud", "zoomIn2d", "zoomOut2d"],
}
"""Settings of every graph on a page."""


def dressed(figure: go.Figure) -> go.Figure:
    """An untitled figure with the page behind it; colours of text and lines come from the style sheet."""
    figure.update_layout(
        paper_bgcolor=_CLEAR,
        plot_bgcolor=_CLEAR,
        font_size=12,
        modebar={"bgcolor": _CLEAR, "color": "#868e96", "activecolor": "#1c7ed6"},
    )
    figure.update_xaxes(title_font_size=12)
    figure.update_yaxes(title_font_size=12)
    figure.update_traces(colorbar_title_font_size=12, selector={"type": "heatmap"})
    return figure


def for_image(figure: go.Figure, titled: go.Figure) -> go.Figure:
    """Let the figure carry its title and the room for it, for a picture that is saved from the page."""
    title = titled.layout.title.to_plotly_json()
    figure.update_layout(meta={"title": title, "top": titled.layout.margin.t})
    return figure
