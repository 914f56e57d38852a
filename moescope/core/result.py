"""`Result`: one answer, the same object in a notebook, a report, the dashboard and on the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moescope.core.errors import InputError
from moescope.core.tabular import Tabular

if TYPE_CHECKING:
    import plotly.graph_objects as go
    import pyarrow as pa

    from moescope.core.notebook_figure import NotebookFigure


@dataclass(frozen=True, repr=False)
class Result(Tabular):
    """One answer from one or more runs: table, figure, and all that is needed to judge them.

    `df()`, `polars()` and `arrow()` give the table, `figure()` the figure, `save(path)` a file. A notebook shows the finding,
    the figure and the first rows.

    Attributes:
        title: the finding, as a sentence a reader can quote.
        table: the numbers, long: layer, block, expert, label, metric, value, ci_low, ci_high, null, n, without the
            columns that do not apply.
        definition: what was computed, in words or as a formula.
        units: column of `table` → unit; `value` may be split by metric as `value[metric]`.
        n: how many observations stand behind the answer, and `n_unit` what they are.
        draw: makes the figure from this result; None where a table says it best.
        interval: what `ci_low` and `ci_high` are; None where the table has none.
        null: what the chance level or control is; None where there is none.
        sql: the query behind the table, with its parameters written in the text as `$name`; `sql_parameters` their values.
        computation: what was computed outside SQL, by name, where the query alone does not give the table.
        notes: what a reader must know besides: parts left out, records missing.
        name, source, parameters, provenance, incomplete: filled in by the registry when the analysis runs.

    Example:
        >>> import pyarrow as pa
        >>> import moescope as ms
        >>> result = ms.Result(title="One expert takes half of all tokens", table=pa.table({"expert": [0], "value": [0.5]}),
        ...                    definition="share of decisions", units={"value": "share"}, n=100, n_unit="decisions")
        >>> result.df()["value"].tolist()
        [0.5]
    """

    title: str
    table: pa.Table
    definition: str
    units: Mapping[str, str]
    n: int
    n_unit: str
    draw: Callable[[Result], go.Figure] | None = None
    interval: str | None = None
    null: str | None = None
    sql: str | None = None
    sql_parameters: Mapping[str, Any] = field(default_factory=dict)
    computation: str | None = None
    notes: tuple[str, ...] = ()
    name: str = ""
    source: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    incomplete: bool = False

    def figure(self, *, titled: bool = True) -> NotebookFigure:
        """The Plotly figure, with n and the state of the run in its subtitle.

        A notebook keeps it as data, for viewers that draw Plotly, and as a picture for all others.

        Args:
            titled: leave out title and subtitle where a page shows them as its own text.

        Raises:
            InputError: this result is told by its table alone.
        """
        if self._figure is None:
            raise InputError(f"{self.name or 'this result'} has no figure", fix="read its table: result.df()")
        return self._figure if titled else self._figure.untitled()

    @property
    def has_figure(self) -> bool:
        """Whether `figure()` draws something."""
        return self.draw is not None

    @cached_property
    def _figure(self) -> NotebookFigure | None:
        if self.draw is None:
            return None
        from moescope.core.figures import finish

        return finish(self.draw(self), title=self.title, subtitle=self.subtitle())

    def subtitle(self) -> str:
        """One line under the title: n, where the numbers come from, and whether the run is whole."""
        run = self.provenance.get("run")
        parts = [f"n = {self.n:,} {self.n_unit}"]
        parts += [str(run)] if run else []
        parts += ["INCOMPLETE RUN"] if self.incomplete else []
        return " · ".join(parts)

    def facts(self) -> dict[str, str]:
        """What a reader needs to judge the answer, label → text, for reports and pages."""
        facts = {"What it shows": self.definition}
        units = ", ".join(f"{column}: {unit}" for column, unit in self.units.items())
        optional = {
            "Units": units,
            "Sample": f"{self.n:,} {self.n_unit}",
            "Interval": self.interval,
            "Chance level": self.null,
            "Computed by": self.computation,
            "Source": self.source,
            "Parameters": ", ".join(f"{k} = {v}" for k, v in self.parameters.items()),
            "Notes": " ".join(self.notes),
        }
        return facts | {label: text for label, text in optional.items() if text}

    def save(self, path: str | Path) -> Path:
        """Write the result to `path`, in the format of its ending.

        The file appears whole or not at all.

        Args:
            path: ending in .html (figure, table, definition, query), .png or .svg (the figure), .csv or .parquet (the table),
                .json (everything but the figure).

        Raises:
            InputError: another ending, a folder that is not there, a figure where there is none, or an image where no
                browser can draw it.
        """
        from moescope.core.result_files import save

        return save(self, Path(path))

    def arrow(self) -> pa.Table:
        """The table as a PyArrow table."""
        return self.table

    def as_json(self) -> dict[str, Any]:
        """Everything but the figure, as plain JSON data."""
        return {
            "name": self.name,
            "title": self.title,
            "definition": self.definition,
            "units": dict(self.units),
            "n": self.n,
            "n_unit": self.n_unit,
            "interval": self.interval,
            "null": self.null,
            "sql": self.sql,
            "sql_parameters": dict(self.sql_parameters),
            "computation": self.computation,
            "notes": list(self.notes),
            "source": self.source,
            "parameters": dict(self.parameters),
            "provenance": dict(self.provenance),
            "incomplete": self.incomplete,
            "table": self.table.to_pylist(),
        }

    def _repr_html_(self) -> str:
        from moescope.core.notebook_result import head, rest

        hint = "<p><code>.figure()</code> draws it.</p>" if self.has_figure else ""
        return f"<div>{head(self)}{hint}{rest(self)}</div>"

    def _ipython_display_(self) -> None:
        from moescope.core.notebook_result import show

        show(self)

    _repr_pretty_ = Tabular._repr_pretty_  # IPython looks for it beside `__repr__`

    def __repr__(self) -> str:
        return f"Result({self.name or 'unnamed'}: {self.title!r}, {self.table.num_rows} rows, {self.subtitle()})"

    def __str__(self) -> str:
        from moescope.core.notebook_result import as_text

        return as_text(self)
