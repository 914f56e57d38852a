"""Figures that survive in a saved notebook: interactive where it can be, a picture everywhere else, never a script."""

from __future__ import annotations

import base64
import html
import json
from typing import Any

import plotly.graph_objects as go
from plotly.io.json import to_json_plotly

from moescope.core.kernel import in_notebook
from moescope.core.picture import png_of, size_of
from moescope.core.text import escaped

PLOTLY = "application/vnd.plotly.v1+json"

# A figure with more data than this is kept as a picture alone, where there is one: five of them stay under a megabyte.
_MOST_DATA = 100_000


class NotebookFigure(go.Figure):  # type: ignore[misc]  # plotly has no types
    """A Plotly figure which a notebook keeps as data for viewers that draw Plotly and as a PNG for all others.

    Plotly's own way puts its whole library, or a link to it, into every notebook. The PNG is drawn by an installed Chrome or
    Chromium (the `images` extra); without one, viewers that cannot draw Plotly show a line that says so.
    """

    # Plotly's own call its renderers; without them, the bundle below is asked for.
    _ipython_display_ = None
    _repr_html_ = None
    _without_title = ""  # what a copy without title was called

    def _repr_mimebundle_(self, *args: Any, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        data = to_json_plotly(self.to_dict())
        bundle: dict[str, Any] = {"text/plain": self._told()}
        facts: dict[str, Any] = {}
        png = self._png(data)
        if png is not None:
            width, height = size_of(self)
            bundle["image/png"] = base64.b64encode(png).decode("ascii")
            facts["image/png"] = {"width": width, "height": height}
        else:
            bundle["text/html"] = (
                f"<p>{escaped(self._told())}: to keep a picture of it in the notebook, "
                "<code>pip install 'moescope[images]'</code> and have Chrome or Chromium.</p>"
            )
        if png is None or len(data) <= _MOST_DATA:
            bundle[PLOTLY] = {**json.loads(data), "config": {"displaylogo": False}}
        return bundle, facts

    def show(self, *args: Any, **options: Any) -> None:
        """In a notebook, show it as the last line of a cell would; elsewhere, and with arguments, Plotly's own `show`."""
        if args or options or not in_notebook():
            super().show(*args, **options)
            return
        from IPython.display import display

        display(self)  # type: ignore[no-untyped-call]  # IPython has no types

    def _png(self, data: str) -> bytes | None:
        """The picture, drawn once for each state of the figure."""
        key = hash(data)
        if getattr(self, "_drawn_for", None) != key:
            self._drawn, self._drawn_for = png_of(self), key
        picture: bytes | None = self._drawn
        return picture

    def _told(self) -> str:
        title = html.unescape((self.layout.title.text or "").replace("<br>", " ")) or self._without_title
        return f"Figure: {title}" if title else "Figure"

    def untitled(self) -> NotebookFigure:
        """A copy without title, for a page that shows it as a heading of its own."""
        copy = NotebookFigure(self)
        copy.update_layout(title=None, margin={"t": 36})
        copy._without_title = self._told().removeprefix("Figure: ")
        return copy
