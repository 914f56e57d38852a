"""Autoencoders in a notebook: one as its facts, those of a store as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moescope.core.notebook_html import box, facts, grid, heading
from moescope.core.tabular import Tabular
from moescope.sae.catalogue import sae_rows

if TYPE_CHECKING:
    import pyarrow as pa

    from moescope.sae.autoencoder import Autoencoder
    from moescope.store.store import Store

_NUMBERS = ("d_in", "d_sae", "vectors", "L0", "explained variance")


class Listed(list[dict[str, Any]], Tabular):
    """Rows of `saes`, shown as a table of what tells them apart."""

    _repr_pretty_ = Tabular._repr_pretty_  # IPython looks for it beside `__repr__`

    def __repr__(self) -> str:
        return f"[autoencoders: {', '.join(str(row['name']) for row in self) or 'none'}]"

    def __str__(self) -> str:
        lines = [
            ", ".join(f"{name} {value}" for name, value in told.items() if value is not None) for told in self._told()
        ]
        return "\n".join(lines) or "no autoencoders"

    def _repr_html_(self) -> str:
        rows = self._told()
        count = f"{len(self)} autoencoder{'s' * (len(self) != 1)}"
        table = grid((list(row.values()) for row in rows), list(rows[0]), numbers=_NUMBERS) if rows else ""
        return box(heading(count, "moescope.sae.load(store, name) opens one." if rows else ""), table)

    def arrow(self) -> pa.Table:
        """What tells them apart, a row each, as a PyArrow table."""
        import pyarrow as pa

        return pa.Table.from_pylist(self._told())

    def _told(self) -> list[dict[str, Any]]:
        return [_told(row) for row in self]


def listed(store: Store) -> Listed:
    """Every autoencoder of a store, the newest last: its row of the table `saes`, JSON columns read.

    Args:
        store: to look in.

    Returns:
        A list of mappings; a notebook shows it as a table, and `.df()` gives that.

    Example:
        >>> import pathlib, tempfile
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     len(ms.sae.listed(store))
        0
    """
    return Listed(sae_rows(store))


def autoencoder_html(autoencoder: Autoencoder) -> str:
    """What an autoencoder is of, how wide it is, and how well it did on vectors held out."""
    told = {"site": str(autoencoder.site), "d_in": autoencoder.d_in, "d_sae": autoencoder.d_sae}
    shown = {**_told(autoencoder.row), **told} if autoencoder.row else told
    return box(heading(f"Autoencoder {autoencoder.name}"), facts({key: shown[key] for key in shown if key != "name"}))


def _told(row: dict[str, Any]) -> dict[str, Any]:
    summary = row.get("summary") or {}
    held_out = summary.get("held_out") or {}
    return {
        "name": row.get("name"),
        "site": row.get("site"),
        "expert": row.get("expert"),
        "architecture": row.get("architecture"),
        "d_in": row.get("d_in"),
        "d_sae": row.get("d_sae"),
        "vectors": row.get("vectors"),
        "L0": held_out.get("l0", summary.get("l0")),
        "explained variance": held_out.get("explained_variance", summary.get("explained_variance")),
    }
