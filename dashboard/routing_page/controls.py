"""The fields over a tab's panels; each is one parameter of the address."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.dashboard.records import Router
from moescope.dashboard.routing_page.tabs import Control
from moescope.dashboard.url_state import ViewState


def fields(controls: tuple[Control, ...], known: list[Router], state: ViewState, *, labelled: bool) -> Any:
    """The row of fields, filled from the address."""
    return html.Div(
        [_field(control, known, state, labelled) for control in controls], className="controls routing-controls"
    )


def value_of(control: Control, state: ViewState) -> str | int | float:
    """What a field holds at an address."""
    if control.name == "layer":
        return str(state.layer.number) if state.layer else ""
    text = state.given(control.name)
    return text or control.start


def _field(control: Control, known: list[Router], state: ViewState, labelled: bool) -> Any:
    identity, value = {"url": control.name}, value_of(control, state)
    if control.kind == "choice":
        options = {v: word for v, word in control.options.items() if labelled or v != "label"}
        return dmc.Select(
            id=identity,
            label=control.label,
            data=[{"value": v, "label": word} for v, word in options.items()],
            value=str(value),
            allowDeselect=False,
            size="xs",
            w=max(112, 34 + 8 * max(len(control.label), *map(len, options.values()))),
        )
    if control.kind == "layer":
        layers = sorted({router.layer for router in known})
        return dmc.Select(
            id=identity,
            label=control.label,
            data=[{"value": str(layer), "label": f"L{layer}"} for layer in layers],
            value=str(value) or None,
            placeholder=control.hint,
            clearable=True,
            searchable=len(layers) > 12,
            size="xs",
            w=120,
        )
    return dmc.NumberInput(
        id=identity,
        label=control.label,
        value=value,
        min=control.least,
        allowDecimal=control.kind == "decimal",
        allowNegative=False,
        placeholder=control.hint,
        debounce=400,
        hideControls=True,
        size="xs",
        w=max(112, 24 + 8 * len(control.label)),
    )
