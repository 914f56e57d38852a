"""The coverage ledger and the sublayers of the model, as tables that lead to their tokens."""

from __future__ import annotations

import json
from typing import Any

import dash_mantine_components as dmc

from moescope.core.errors import InputError
from moescope.core.sites import Site
from moescope.dashboard import cards, grids, notices
from moescope.dashboard.records import Router, layer_of
from moescope.dashboard.url_state import Layer, ViewState, link
from moescope.store.run import Run


def ledger(run: Run, known: list[Router], plain: ViewState) -> Any:
    """Events expected beside events recorded, site by site, problems first."""
    coverage = run.coverage
    rows = [
        {
            **row,
            "missing": row["expected"] - row["recorded"],
            "state": ("✓ " if row["status"] == "complete" else "▲ ") + row["status"],
            "recorded_href": _site_link(row["site"], known, plain),
        }
        for row in coverage.table.to_pylist()
    ]
    if not rows:
        return cards.section(
            "Coverage ledger",
            notices.empty(
                "No ledger",
                "The ledger is written when a run ends; this one did not end in order. Committed batches are whole.",
            ),
            identity="coverage",
        )
    columns = [
        grids.text_column("site", "Site", width=330),
        {
            "field": "state",
            "headerName": "Status",
            "minWidth": 112,
            "width": 130,
            "cellClassRules": {"cell-problem": {"function": "params.data.status != 'complete'"}},
        },
        grids.number_column("expected", "Expected", ",d", width=130),
        grids.link_column(
            "recorded",
            "Recorded",
            type="rightAligned",
            width=130,
            valueFormatter={"function": "d3.format(',d')(params.value)"},
        ),
        grids.number_column("missing", "Missing", ",d", width=100),
        grids.text_column(
            "detail",
            "What it means",
            width=300,
            valueFormatter={"function": "params.value == null ? '' : params.value"},
        ),
    ]
    return cards.section(
        "Coverage ledger",
        grids.grid("coverage-grid", columns, rows, height=250),
        note=coverage.title + ".",
        identity="coverage",
    )


def anatomy(run: Run, known: list[Router], plain: ViewState) -> Any:
    """Every sublayer with its experts and its routing rule."""
    found = (
        run.sql("SELECT * EXCLUDE (run_id) FROM layers WHERE run_id = $run ORDER BY layer, block")
        .to_arrow_table()
        .to_pylist()
    )
    if not found:
        return cards.section("Anatomy", dmc.Text("Not recorded.", className="muted"))
    places = {(r.layer, r.block): r for r in known}
    rows = []
    for row in found:
        router = places.get((row["layer"], row["block"]))
        rows.append(
            {
                **row,
                "rule": _rule(row["routing_rule"]),
                "n_experts_href": link("/experts", plain.but(layer=layer_of(router, known))) if router else None,
            }
        )
    whole = ",d"
    columns = [
        grids.number_column("layer", "Layer", whole, width=80),
        grids.text_column("block", "Block", width=90),
        grids.text_column("kind", "Kind", width=100),
        grids.link_column("n_experts", "Experts", type="rightAligned", width=90),
        grids.number_column("top_k", "Chosen", whole, width=90),
        grids.number_column("n_shared", "Shared", whole, width=90),
        grids.number_column("n_null", "Null", whole, width=80),
        grids.number_column("d_expert", "Neurons", whole, width=100),
        grids.text_column("rule", "Routing rule", width=520),
    ]
    return cards.section(
        "Anatomy",
        grids.grid("anatomy-grid", columns, rows, height=420),
        note=f"{len(found)} sublayers, found by looking at the model.",
    )


def _site_link(site: str, known: list[Router], plain: ViewState) -> str:
    """Where a site's events are: its layer in the token view, or the token view as it is."""
    try:
        place = Site.parse(site)
    except InputError:
        return link("/tokens", plain)
    router = next((r for r in known if (r.layer, r.block) == (place.layer, place.block)), None)
    if router is not None:
        return link("/tokens", plain.but(layer=layer_of(router, known)))
    return link("/tokens", plain.but(layer=Layer(place.layer), mode="norm"))


def _rule(text: str | None) -> str | None:
    return (
        None
        if not text
        else ", ".join(
            f"{key.replace('_', ' ')}: {value}" for key, value in json.loads(text).items() if value is not None
        )
    )
