"""One token's path through the layers as plain data, for a table that the browser draws."""

from __future__ import annotations

from typing import Any

from moescope.dashboard import numbers
from moescope.dashboard.records import Router, expert_name, layer_of, model_layers, routers
from moescope.dashboard.url_state import Layer, ViewState, link
from moescope.store.run import Run

NOT_RECORDED = "not recorded"

_ROUTING = "SELECT layer, block, experts, weights, margin, entropy FROM routing WHERE run_id = ? AND token = ?"
_NORMS = "SELECT layer, block, norms FROM expert_outputs WHERE run_id = ? AND token = ?"
_RESIDUAL = "SELECT layer, norm, top_values, top_channels FROM residual WHERE run_id = ? AND token = ?"
_MASSIVE = """
    SELECT layer, channel, value, ratio
    FROM massive_activations
    WHERE run_id = ? AND token = ?
    ORDER BY layer, abs(value) DESC
"""


def token_path(run: Run, token: int, state: ViewState) -> list[dict[str, Any]]:
    """A row a router, and a row a layer without one: texts of its cells, and links.

    Each row has `name`, `href` (the text coloured at that layer), `here` (whether it is the layer in view), `experts` (a list,
    or a text where there are none), `margin`, `entropy`, `residual`, `largest` (channels) and `massive` (a list of texts).
    """
    known = routers(run)
    chosen = {(layer, block): rest for layer, block, *rest in run.store.fetch(_ROUTING, [run.run_id, token])}
    norms = {(layer, block): found for layer, block, found in run.store.fetch(_NORMS, [run.run_id, token])}
    streams = {layer: rest for layer, *rest in run.store.fetch(_RESIDUAL, [run.run_id, token])}
    massive: dict[int, list[str]] = {}
    for layer, channel, value, ratio in run.store.fetch(_MASSIVE, [run.run_id, token]):
        text = f"channel {channel}: {numbers.decimal(value, 1)}, {numbers.count(ratio)} × the median"
        massive.setdefault(layer, []).append(text)
    rows = []
    for layer in model_layers(run):
        here = [router for router in known if router.layer == layer]
        stream = _stream(streams.get(layer)) | {"massive": massive.get(layer, [])}
        for router in here:
            place = layer_of(router, known)
            row = _decision(run, place, chosen.get((layer, router.block)), norms.get((layer, router.block)))
            rows.append({**_layer(state, place, router), **row, **stream})
        if not here:
            empty = {"experts": "dense", "margin": numbers.MISSING, "entropy": numbers.MISSING}
            rows.append({**_layer(state, Layer(layer), None), **empty, **stream})
    return rows


def _layer(state: ViewState, place: Layer, router: Router | None) -> dict[str, Any]:
    there = state.but(layer=place, expert=None, pins=())
    name = router.name if router is not None else f"L{place.number}"
    return {"name": name, "href": link("/tokens", there), "here": state.layer == place}


def _decision(run: Run, place: Layer, decision: list[Any] | None, norms: list[float] | None) -> dict[str, Any]:
    if decision is None:
        return {"experts": NOT_RECORDED, "margin": NOT_RECORDED, "entropy": NOT_RECORDED}
    experts, weights, margin, entropy = decision
    unknown: list[float | None] = [None] * len(experts)
    slots = zip(experts, weights or unknown, norms or unknown, strict=True)
    there = ViewState(run=run.name, layer=place)
    return {
        "experts": [
            {
                "name": expert_name(expert),
                "href": link("/experts", there.but(expert=expert)),
                "weight": numbers.decimal(weight),
                "norm": "" if norm is None else numbers.decimal(norm, 2),
            }
            for expert, weight, norm in slots
        ],
        "margin": _number(margin),
        "entropy": _number(entropy),
    }


def _stream(found: list[Any] | None) -> dict[str, Any]:
    if found is None:
        return {"residual": NOT_RECORDED, "largest": []}
    norm, values, channels = found
    pairs = zip(channels or [], values or [], strict=False)
    return {
        "residual": numbers.decimal(norm, 2),
        "largest": [f"channel {channel}: {numbers.decimal(value, 2)}" for channel, value in pairs],
    }


def _number(value: float | None) -> str:
    return NOT_RECORDED if numbers.absent(value) else numbers.decimal(value)
