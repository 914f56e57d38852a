"""The table of a result as a grid: numbers in their form, and names that lead to what they name."""

from __future__ import annotations

import json
import math
from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.dashboard import grids, numbers
from moescope.dashboard.records import Router, layer_of, routers
from moescope.dashboard.url_state import Layer, ViewState, link
from moescope.store.run import Run
from moescope.store.store import Store

MOST_ROWS = 2000
_EXPERTS = {"expert": "layer", "other": "layer", "to_expert": "to_layer"}
_LAYERS = {"layer": "block", "to_layer": "to_block"}
_LINKED = ("layer", "to_layer", "expert", "other", "to_expert", "head", "feature", "label", "sequence_id", "token")


def result_table(identity: Any, result: Result, store: Store, *, height: int = 330) -> Any:
    """The first rows of a result's table, with links to the tokens, experts, heads and features that they name."""
    rows = result.table.slice(0, MOST_ROWS).to_pylist()
    names = result.table.column_names
    links = _Links(result, store)
    shown = [
        {name: _plain(value) for name, value in row.items()}
        | {f"{name}_href": links.of(name, row) for name in names if name in _LINKED}
        for row in rows
    ]
    columns = [_column(name, result, any(row.get(f"{name}_href") for row in shown)) for name in names]
    total = result.table.num_rows
    said = f"{total:,} rows" if total <= MOST_ROWS else f"The first {MOST_ROWS:,} of {total:,} rows; the files hold all"
    return html.Div(
        [
            dmc.Text(said + ".", className="muted"),
            grids.grid(identity, columns, shown, height=height, fit="autoSize"),
        ],
        className="result-table",
    )


def _column(name: str, result: Result, linked: bool) -> dict[str, Any]:
    unit = result.units.get(name)
    heading = name.replace("_", " ") if unit is None or len(unit) > 24 else f"{name.replace('_', ' ')} ({unit})"
    kind = result.table.schema.field(name).type
    is_number = str(kind).startswith(("int", "uint", "float", "double", "decimal"))
    options: dict[str, Any] = {"headerTooltip": f"{name}: {unit}" if unit else name}
    if is_number:
        options |= {"type": "rightAligned", "valueFormatter": {"function": "MoescopeNumber(params.value)"}}
    if linked:
        return grids.link_column(name, heading, **options)
    if is_number:
        return {"field": name, "headerName": heading, "filter": "agNumberColumnFilter", **options}
    return grids.text_column(name, heading, **options)


def _plain(value: Any) -> Any:
    """A value as JSON has it: what it lacks becomes None or text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None if math.isnan(value) else "∞" if value > 0 else "−∞"
    if value is None or isinstance(value, (bool, int, str)):
        return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, (list, dict)) else str(value)


class _Links:
    """Where the names in a result's rows lead."""

    def __init__(self, result: Result, store: Store) -> None:
        name = _first_run(result)
        self.known: list[Router] = []
        self.plain: ViewState | None = None
        try:
            run: Run = store.run(name)
        except InputError:  # a result of several runs, or of one that is gone, has plain names
            return
        self.known = routers(run)
        sae = result.parameters.get("sae")
        self.plain = ViewState(run=run.name, sae=sae if isinstance(sae, str) else None)

    def of(self, name: str, row: dict[str, Any]) -> str | None:
        """The link of one cell; None where it names nothing that a page shows."""
        value = row.get(name)
        if self.plain is None or value is None or (isinstance(value, float) and numbers.absent(value)):
            return None
        if name in _EXPERTS:
            return self._expert(value, row, name)
        if name in _LAYERS:
            layer = self._layer(row, name)
            return None if layer is None else link("/experts", self.plain.but(sae=None, layer=layer))
        if name == "label":
            return link("/tokens", self.plain.but(sae=None, label=str(value)))
        return self._numbered(int(value), row, name) if isinstance(value, (int, float)) and value >= 0 else None

    def _numbered(self, value: int, row: dict[str, Any], name: str) -> str | None:
        plain, number = self.plain or ViewState(), row.get("layer")
        if name == "head":
            return (
                link("/phenomena", plain.but(sae=None, layer=Layer(int(number)), head=value))
                if number is not None
                else None
            )
        if name == "feature":
            return link("/features", plain.but(sae=row.get("sae") or plain.sae, feature=value))
        return link("/tokens", plain.but(sae=None, **{{"sequence_id": "sequence"}.get(name, name): value}))

    def _expert(self, value: Any, row: dict[str, Any], name: str) -> str | None:
        layer = self._layer(row, _EXPERTS[name])
        if self.plain is None or layer is None or not isinstance(value, (int, float)):
            return None
        return link("/experts", self.plain.but(sae=None, layer=layer, expert=int(value)))

    def _layer(self, row: dict[str, Any], name: str) -> Layer | None:
        """The address of the router in a row; None where that layer has none."""
        number, block = row.get(name), row.get(_LAYERS[name])
        if number is None or (isinstance(number, float) and numbers.absent(number)):
            return None
        found = (r for r in self.known if r.layer == int(number) and block in (None, r.block))
        router = next(found, None)
        return None if router is None else layer_of(router, self.known)


def _first_run(result: Result) -> str:
    several = result.provenance.get("runs")
    return str((several[0] if several else result.provenance).get("run", ""))
