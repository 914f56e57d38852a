"""A result's figure on a page: the page's own background and ink, in light and dark."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import plotly.graph_objects as go

_CLEAR = "rgba(0,0,0,0)"


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
