"""The controls of the token view; each is one parameter of the address."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.dashboard.browser import named
from moescope.dashboard.records import Router, expert_name, layer_of, model_layers
from moescope.dashboard.token_changes import partners
from moescope.dashboard.token_features import read_autoencoders
from moescope.dashboard.token_view import NO_LABEL
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
    "feature": "Feature",
    "changed": "Changed",
}
_POLITE: dict[str, Any] = {"aria-live": "polite"}
_SMALL: dict[str, Any] = {"size": "xs"}


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
    modes += ["norm"] if residual else []
    modes += ["feature"] if read_autoencoders(run) else []
    return modes + (["changed"] if known and partners(run) else [])


def defaults(run: Run, known: list[Router], modes: list[Mode]) -> dict[str, Any]:
    """What each control shows where the address does not name its parameter."""
    autoencoders, others = read_autoencoders(run), partners(run)
    return {
        "layer": _first_layer(run, known),
        "mode": modes[0],
        "label": "",
        "sequence": "",
        "expert": "",
        "pins": [],
        "page": 1,
        "q": "",
        "view": "text",
        "sae": autoencoders[0][0] if len(autoencoders) == 1 else "",
        "feature": "",
        "other": others[0] if others else "",
    }


def controls(run: Run, known: list[Router], modes: list[Mode]) -> Any:
    """The row of controls, those that the run has something for."""
    experts = max((router.experts for router in known), default=0)
    shown = [_view(), _layer(run, known), _colour(modes)]
    shown += _of_features(run) if "feature" in modes else []
    shown += _of_changes(run) if "changed" in modes else []
    shown += _of_texts(run)
    shown += _of_experts(experts) if experts else []
    shown.append(
        dmc.TextInput(id={"url": "q"}, label="Find in this text", placeholder="text", debounce=250, w=120, **_SMALL)
    )
    shown.append(
        html.Div(
            dmc.Pagination(id={"url": "page"}, total=1, hideWithOnePage=True, size="sm", boundaries=1, siblings=1),
            className="pages",
        )
    )
    return html.Div(shown, className="controls", id="token-controls")


def matches() -> Any:
    """Steps from one match and one sequence to the next; the browser fills in how many there are."""
    return html.Div(
        [
            html.Div(
                [
                    dmc.ActionIcon("‹", id="match-previous", variant="default", size="sm", **named("previous match")),
                    html.Span(id="match-count", className="match-count", **_POLITE),
                    dmc.ActionIcon("›", id="match-next", variant="default", size="sm", **named("next match")),
                ],
                id="match-box",
                className="match-box",
            ),
            html.Div(
                [
                    dmc.ActionIcon(
                        "↑", id="sequence-previous", variant="default", size="sm", **named("previous sequence")
                    ),
                    html.Span("sequence", className="muted"),
                    dmc.ActionIcon("↓", id="sequence-next", variant="default", size="sm", **named("next sequence")),
                ],
                className="match-box sequence-box",
            ),
        ],
        className="match-boxes",
    )


def _view() -> Any:
    return _labelled(
        "View",
        dmc.SegmentedControl(
            id={"url": "view"},
            data=[{"value": "text", "label": "Text"}, {"value": "table", "label": "Table"}],
            size="xs",
        ),
    )


def _layer(run: Run, known: list[Router]) -> Any:
    return dmc.Select(
        id={"url": "layer"},
        label="Layer",
        data=_layer_options(run, known),
        allowDeselect=False,
        searchable=True,
        w=84,
        **_SMALL,
    )


def _colour(modes: list[Mode]) -> Any:
    data = [{"value": mode, "label": _NAMES[mode]} for mode in modes]
    return _labelled("Colour", dmc.SegmentedControl(id={"url": "mode"}, data=data, size="xs"))


def _labelled(name: str, control: Any) -> Any:
    return html.Div([html.Div(name, className="control-label"), control], role="group", **named(name))


def _of_features(run: Run) -> list[Any]:
    read = read_autoencoders(run)
    parts = [
        dmc.Select(
            id={"url": "sae"},
            label="Autoencoder",
            data=[{"value": name, "label": name} for name, _, _ in read],
            allowDeselect=False,
            w=140,
            **_SMALL,
        ),
        dmc.NumberInput(
            id={"url": "feature"},
            label="Feature",
            min=0,
            allowDecimal=False,
            allowNegative=False,
            debounce=400,
            w=84,
            hideControls=True,
            placeholder="number",
            **_SMALL,
        ),
    ]
    return [html.Div(parts, className="for-feature")]


def _of_changes(run: Run) -> list[Any]:
    data = [{"value": name, "label": name} for name in partners(run)]
    picker = dmc.Select(id={"url": "other"}, label="Against", data=data, allowDeselect=False, w=160, **_SMALL)
    return [html.Div(picker, className="for-changed")]


def _of_texts(run: Run) -> list[Any]:
    parts: list[Any] = []
    labelled = _labels(run)
    if any(label is not None for label, _ in labelled):
        data = [
            {
                "value": NO_LABEL if label is None else label,
                "label": f"{'no label' if label is None else label} ({n:,})",
            }
            for label, n in labelled
            if label != ""
        ]
        picker = {"clearable": True, "searchable": True, "placeholder": "all", "w": 128}
        parts.append(dmc.Select(id={"url": "label"}, label="Label", data=data, **picker, **_SMALL))
    parts.append(
        dmc.NumberInput(
            id={"url": "sequence"},
            label="Sequence",
            min=0,
            allowDecimal=False,
            allowNegative=False,
            placeholder="all",
            debounce=400,
            w=76,
            hideControls=True,
            **_SMALL,
        )
    )
    return parts


def _of_experts(experts: int) -> list[Any]:
    return [
        dmc.NumberInput(
            id={"url": "expert"},
            label="Expert",
            allowDecimal=False,
            placeholder="any",
            debounce=400,
            w=68,
            hideControls=True,
            **_SMALL,
        ),
        html.Div(
            dmc.MultiSelect(
                id={"url": "pins"},
                label="Pinned experts",
                data=[{"value": str(e), "label": expert_name(e)} for e in range(experts)],
                maxValues=MAX_PINS,
                searchable=True,
                clearable=True,
                placeholder="by lift",
                hidePickedOptions=True,
                w=118,
                **_SMALL,
            ),
            className="for-pins",
        ),
    ]


def _labels(run: Run) -> list[tuple[str | None, int]]:
    """Labels of the run's texts with their tokens; None, last, stands for the texts without one."""
    return run.store.fetch(
        """
        SELECT label, sum(n_tokens)::BIGINT
        FROM sequences
        WHERE run_id = ?
        GROUP BY label
        ORDER BY label NULLS LAST
        """,
        [run.run_id],
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
