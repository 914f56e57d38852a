"""The controls of the token view; each is one parameter of the address."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.dashboard.browser import named
from moescope.dashboard.records import Router, expert_name, labels, layer_of, model_layers
from moescope.dashboard.url_state import MAX_PINS, Mode
from moescope.store.run import Run

AT_ROUTER: tuple[Mode, ...] = ("pins", "weight", "margin", "entropy")
_NAMES: dict[Mode, str] = {
    "pins": "Pins",
    "weight": "Weight",
    "margin": "Margin",
    "entropy": "Entropy",
    "nll": "NLL",
    "norm": "Residual",
}
_POLITE: dict[str, Any] = {"aria-live": "polite"}


def offered_modes(run: Run, known: list[Router]) -> list[Mode]:
    """The modes that the run's records can show, the usual one first; none for a run without tokens."""
    tokens, likelihoods, residual = run.store.fetch(
        """
        SELECT
            EXISTS (SELECT 1 FROM tokens WHERE run_id = $run),
            EXISTS (SELECT 1 FROM tokens WHERE run_id = $run AND nll IS NOT NULL),
            EXISTS (SELECT 1 FROM residual WHERE run_id = $run)
        """,
        {"run": run.run_id},
    )[0]
    if not tokens:
        return []
    modes: list[Mode] = [*(AT_ROUTER if known else ())]
    modes += ["nll"] if likelihoods or not known else []
    return modes + (["norm"] if residual else [])


def defaults(run: Run, known: list[Router], modes: list[Mode]) -> dict[str, Any]:
    """What each control shows where the address does not name its parameter."""
    return {
        "layer": _first_layer(run, known),
        "mode": modes[0],
        "label": "",
        "sequence": "",
        "pins": [],
        "page": 1,
        "q": "",
    }


def controls(run: Run, known: list[Router], modes: list[Mode]) -> Any:
    """The row of controls, those that the run has something for."""
    experts = max((router.experts for router in known), default=0)
    labelled = labels(run)
    shared: dict[str, Any] = {"size": "xs"}
    controls: list[Any] = [
        dmc.Select(
            id={"url": "layer"},
            label="Layer",
            data=_layer_options(run, known),
            allowDeselect=False,
            searchable=True,
            w=104,
            **shared,
        ),
        html.Div(
            [
                html.Div("Colour", className="control-label"),
                dmc.SegmentedControl(
                    id={"url": "mode"}, data=[{"value": m, "label": _NAMES[m]} for m in modes], size="xs"
                ),
            ]
        ),
    ]
    if labelled:
        data = [{"value": label, "label": f"{label} ({n:,})"} for label, n in labelled if label != ""]
        controls.append(
            dmc.Select(
                id={"url": "label"},
                label="Label",
                data=data,
                clearable=True,
                searchable=True,
                placeholder="all",
                w=168,
                **shared,
            )
        )
    controls.append(
        dmc.NumberInput(
            id={"url": "sequence"},
            label="Sequence",
            min=0,
            allowDecimal=False,
            allowNegative=False,
            placeholder="all",
            debounce=400,
            w=92,
            hideControls=True,
            **shared,
        )
    )
    if experts:
        controls.append(
            dmc.MultiSelect(
                id={"url": "pins"},
                label="Pinned experts",
                data=[{"value": str(e), "label": expert_name(e)} for e in range(experts)],
                maxValues=MAX_PINS,
                searchable=True,
                clearable=True,
                placeholder="by lift",
                hidePickedOptions=True,
                miw=150,
                **shared,
            )
        )
    controls.append(
        dmc.TextInput(id={"url": "q"}, label="Find in this text", placeholder="text", debounce=250, w=170, **shared)
    )
    controls.append(
        html.Div(
            dmc.Pagination(id={"url": "page"}, total=1, hideWithOnePage=True, size="sm", boundaries=1, siblings=1),
            className="pages",
        )
    )
    return html.Div(controls, className="controls")


def matches() -> Any:
    """Steps from one match to the next; the browser fills in how many there are."""
    return html.Div(
        [
            dmc.ActionIcon("‹", id="match-previous", variant="default", size="sm", **named("previous match")),
            html.Span(id="match-count", className="match-count", **_POLITE),
            dmc.ActionIcon("›", id="match-next", variant="default", size="sm", **named("next match")),
        ],
        id="match-box",
        className="match-box",
    )


def _first_layer(run: Run, known: list[Router]) -> str:
    if known:
        return str(layer_of(known[0], known))
    layers = model_layers(run)
    return str(layers[0]) if layers else ""


def _layer_options(run: Run, known: list[Router]) -> list[dict[str, str]]:
    options = []
    for layer in model_layers(run):
        here = [router for router in known if router.layer == layer]
        options += [{"value": str(layer_of(router, known)), "label": router.name} for router in here]
        if not here:
            options.append({"value": str(layer), "label": f"L{layer} dense" if known else f"L{layer}"})
    return options
