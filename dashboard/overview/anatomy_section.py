"""The anatomy map on the overview: which measure colours it, and where a chosen layer leads."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import dcc, html

from moescope.dashboard import cards
from moescope.dashboard.panel import panel
from moescope.dashboard.records import routers
from moescope.dashboard.url_state import Layer, ViewState, link
from moescope.routing.anatomy_map import MEASURES
from moescope.store.run import Run

DEFAULT = "all"


def anatomy_section(run: Run) -> Any:
    """The switch, the map (computed when it comes into view) and the links of the chosen layer."""
    choices = [{"value": DEFAULT, "label": "every measure, a row each"}]
    choices += [{"value": name, "label": f"{m.metric} ({m.kind})"} for name, m in MEASURES.items()]
    switch = dmc.Select(
        id={"url": "measure"},
        data=choices,
        value=DEFAULT,
        size="xs",
        w=320,
        allowDeselect=False,
        label="Colour",
        classNames={"label": "control-label"},
        mb="sm",
    )
    return html.Div(
        [
            dcc.Store(id={"defaults": "overview"}, data={"measure": DEFAULT}),
            cards.section(
                "Anatomy map",
                html.Div(
                    [
                        switch,
                        panel(
                            "anatomymap", "anatomy_map", [run], wanted={"measure": "measure"}, click="layer", height=320
                        ),
                        html.Div(id="ov-layer", className="ov-layer", role="status"),
                    ]
                ),
                note="Layers by what was measured of them. Click a column to choose its layer.",
                identity="map",
            ),
        ]
    )


def layer_links(run: Run, layer: Layer | None) -> Any:
    """Where to look at a layer: its tokens, experts, phenomena."""
    if layer is None:
        return None
    plain = ViewState(run=run.name, layer=layer)
    kinds = run.store.fetch(
        "SELECT block, kind FROM layers WHERE run_id = ? AND layer = ? ORDER BY block", [run.run_id, layer.number]
    )
    if not kinds:
        return dmc.Text(f"This model has no layer {layer.number}.", className="muted")
    router = any(r.layer == layer.number for r in routers(run))
    tokens = plain if router else plain.but(mode="norm")
    places = [("its tokens", "/tokens", tokens)]
    places += [("its experts", "/experts", plain)] if router else []
    places += [("routing", "/routing", plain)] if router else []
    places += [("phenomena and heads", "/phenomena", plain), ("features", "/features", plain)]
    words = ", ".join(f"{block} ({kind})" for block, kind in kinds)
    return html.Div(
        [
            dmc.Text(f"L{layer.number}: {words}.", span=True, className="strong foreign"),
            *[dmc.Anchor(name, href=link(path, state), size="sm") for name, path, state in places],
        ],
        className="ov-layer-links",
    )
