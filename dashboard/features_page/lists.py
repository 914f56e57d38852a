"""The list of autoencoders, and the list of the latents of one, which is read row by row as it is scrolled."""

from __future__ import annotations

from typing import Any

import dash_ag_grid as dag
import dash_mantine_components as dmc
from dash import dcc, html

from moescope.dashboard import grids, numbers
from moescope.dashboard.features_page.readings import Reading
from moescope.dashboard.url_state import ViewState, link
from moescope.store.run import Run

_BLOCK = 100
_LIVE: dict[str, Any] = {"aria-live": "polite"}
_HEIGHT = 560
_UNFILTERED = frozenset({"peaks", "lift_bounds", "q", "rule", "writer", "description"})
_PERCENT = (
    "params.value == null ? '—' : params.value === 0 ? '0 %' : "
    "(params.value < 0.001 ? d3.format('.2r')(100 * params.value) : d3.format('.2f')(100 * params.value)) + ' %'"
)
_Q = "params.value == null ? '—' : params.value < 0.001 ? '<0.001' : d3.format('.3f')(params.value)"
_DASH = "params.value == null || params.value === '' ? '—' : params.value"
_THERE = "SELECT 1 FROM query_table($table) WHERE run_id = $run AND sae_id = $sae LIMIT 1"


def sae_grid(rows: list[dict[str, Any]], state: ViewState) -> Any:
    """Every autoencoder of the store, with the run whose numbers stand beside it."""
    columns = [
        grids.link_column("name", "Autoencoder", minWidth=130),
        grids.text_column("site", "Reads", minWidth=180, flex=1),
        grids.number_column("d_sae", "Latents", ",d", minWidth=88),
        grids.text_column("k", "k", width=56, headerTooltip="active latents a vector, as asked for"),
        grids.text_column("trained_as", "Form", minWidth=84),
        grids.text_column(
            "trained_on", "Trained on", minWidth=110, headerTooltip="run whose vectors it was trained on"
        ),
        grids.text_column("run", "Numbers from", minWidth=118, headerTooltip="run on which it was read or judged"),
        grids.text_column(
            "fvu",
            "FVU",
            minWidth=160,
            headerTooltip="fraction of variance unexplained, with its 95 % interval over documents",
        ),
        grids.text_column(
            "delta_ce",
            "ΔCE (nats)",
            minWidth=188,
            headerTooltip="what the model loses with its reconstruction put in, with its 95 % interval over documents",
        ),
        grids.text_column("dead", "Dead", minWidth=78, headerTooltip="latents that fired on no token"),
        grids.number_column("l0", "L0", ",.1f", minWidth=66, headerTooltip="active latents a token"),
        grids.text_column("read", "Features", minWidth=94),
    ]
    for column in columns:
        column["filter"] = False
    return grids.grid("sae-grid", columns, [_sae_row(row, state) for row in rows], height=240, row_id="params.data.id")


def _sae_row(row: dict[str, Any], state: ViewState) -> dict[str, Any]:
    site = row["site"] if row["target_site"] is None else f"{row['site']} → {row['target_site']}"
    site += "" if row["expert"] is None else f", expert {row['expert']}"
    return {
        "id": f"{row['sae_id']}|{row['run']}",
        "name": row["name"],
        "name_href": link("/features", state.but(sae=row["name"], feature=None, run=row["run"] or state.run)),
        "site": site,
        "d_sae": row["d_sae"],
        "k": row["k"] or "—",
        "trained_as": row["trained_as"] or row["architecture"],
        "trained_on": row["trained_on"] or ("a run no longer here" if row["trained_here"] else "published"),
        "run": row["run"] or "not read or judged",
        "fvu": _bounds(row["fvu"], row["fvu_low"], row["fvu_high"], 3),
        "delta_ce": _bounds(row["delta_ce"], row["ce_low"], row["ce_high"], 4),
        "dead": numbers.MISSING if row["dead"] is None else numbers.share(row["dead"], 1.0),
        "l0": row["l0"],
        "read": "read" if row["read"] else "not read",
    }


def _bounds(value: float | None, low: float | None, high: float | None, places: int) -> str:
    if value is None:
        return numbers.MISSING
    bounds = (
        "" if low is None or high is None else f" [{numbers.decimal(low, places)}, {numbers.decimal(high, places)}]"
    )
    return f"{numbers.decimal(value, places)}{bounds}"


def latent_grid(run: Run, reading: Reading) -> Any:
    """The search box and the list; its rows are asked for as they come into view.

    Args:
        run, reading: of which; columns of what was not recorded for them are left out.
    """
    columns = [
        _number("feature", "Latent", "d", width=92),
        _text("peaks", "Fires most on", minWidth=170, flex=3, sortable=False),
        {**_number("density", "Density", "", width=104), "valueFormatter": {"function": _PERCENT}},
        _number("maximum", "Largest", ",.2f", width=104, headerTooltip="largest activation"),
    ]
    if _there(run, reading, "feature_labels"):
        columns += [
            _text(
                "label",
                "Label",
                minWidth=96,
                flex=1,
                headerTooltip="label of largest lift at a false-discovery rate of 5 %",
            ),
            _number("lift", "Lift", ",.2f", width=84, headerTooltip="P(active | label) ÷ P(active)"),
            _text(
                "lift_bounds",
                "95 %",
                minWidth=116,
                sortable=False,
                headerTooltip="interval of the lift, over documents",
            ),
            {
                **_number(
                    "q", "q", "", width=76, headerTooltip="false-discovery rate at which the label would be called"
                ),
                "valueFormatter": {"function": _Q},
            },
        ]
    columns += [
        _number(
            "score", "Score", ".3f", width=92,
            headerTooltip="largest correlation with what a table of tokens, tokens before or labels predicts",
        ),
        _text("rule", "By", width=104, headerTooltip="which table predicts it best"),
    ]  # fmt: skip
    if _there(run, reading, "feature_experts"):
        columns.append(
            _text(
                "writer",
                "Writer",
                width=88,
                headerTooltip="expert that writes it most, in excess of its inactive tokens",
            )
        )
    if _there(run, reading, "descriptions"):
        columns.append(_text("description", "Description", minWidth=150, flex=2))
    box = dmc.TextInput(
        id={"url": "q"},
        label="Search tokens, labels, descriptions, experts, numbers",
        placeholder="for instance python, or 17",
        debounce=300,
        size="xs",
        w=380,
    )
    for column in columns:
        if column["field"] in _UNFILTERED:
            column["filter"] = False
    made = grids.grid(
        "latent-grid",
        columns,
        [],
        height=_HEIGHT,
        row_id="params.data.id",
        cacheBlockSize=_BLOCK,
        maxBlocksInCache=20,
        infiniteInitialRowCount=_BLOCK,
        rowBuffer=5,
    )
    return html.Div(
        [
            dcc.Store(id={"defaults": "latents"}, data={"q": ""}),
            html.Div(
                [box, html.Div(id="latent-count", className="muted", **_LIVE)],
                className="latent-search",
            ),
            infinite(made),
        ]
    )


def infinite(made: dag.AgGrid) -> dag.AgGrid:
    """A grid whose rows are asked for a block at a time."""
    made.rowModelType = "infinite"
    del made.rowData
    made.style = {"height": _HEIGHT, "width": "100%"}
    return made


def _there(run: Run, reading: Reading, table: str) -> bool:
    given = {"table": table, "run": run.run_id, "sae": reading.sae_id}
    return bool(run.store.fetch(_THERE, given))


def _number(field: str, name: str, form: str, **options: Any) -> dict[str, Any]:
    """A number that the server sorts and filters."""
    return {
        **grids.number_column(field, name, form, **options),
        "minWidth": options.get("width", 70),
        "filter": "agNumberColumnFilter",
    }


def _text(field: str, name: str, **options: Any) -> dict[str, Any]:
    least = options.get("minWidth", options.get("width", 90))
    return {**grids.text_column(field, name, **options), "minWidth": least, "valueFormatter": {"function": _DASH}}
