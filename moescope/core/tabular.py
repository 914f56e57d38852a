"""What holds a table gives it to pandas, polars and Arrow alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from moescope.core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    import polars as pl
    import pyarrow as pa


class Tabular(ABC):
    """An object with one table behind it; its `repr` is one line, its `str` fills a screen at most."""

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """In IPython: as text by itself, in one line inside of something else."""
        printer.text(repr(self) if cycle or printer.indentation else str(self))

    @abstractmethod
    def arrow(self) -> pa.Table:
        """The table as a PyArrow table."""

    def df(self) -> pd.DataFrame:
        """The table as a pandas DataFrame."""
        frame: pd.DataFrame = self.arrow().to_pandas()
        return frame

    def polars(self) -> pl.DataFrame:
        """The table as a polars DataFrame; needs the `polars` extra.

        Raises:
            InputError: polars is not installed.
        """
        try:
            import polars
        except ImportError as missing:
            raise InputError("polars is not installed", fix="pip install 'moescope[polars]'") from missing
        frame = polars.from_arrow(self.arrow())
        assert isinstance(frame, polars.DataFrame)
        return frame
