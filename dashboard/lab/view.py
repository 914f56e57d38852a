"""The parts of the lab's page: what stands there before the browser fills it."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import dcc, html

from moescope.core.edit import edits
from moescope.dashboard.browser import HIDDEN, attributes, named
from moescope.dashboard.lab.asking import sample_prompts, suggested, text_before
from moescope.dashboard.lab.writing import MAX_WRITTEN
from moescope.dashboard.url_state import ViewState
from moescope.store.run import Run

DEFAULTS = {"tokens": 24, "temperature": 0, "seed": 0, "tint": "delta"}
KIND = "ablate"
TINTS = (("delta", "ΔNLL"), ("kl", "KL"), ("switched", "Switched"))


def page(run: Run | None, state: ViewState) -> Any:
    """The whole page; everything in it that has numbers is painted in the browser."""
    prompt = (
        text_before(run, state.token) if run is not None and state.token is not None else None
    ) or sample_prompts()
    return html.Div(
        [
            *[
                dcc.Store(id=name)
                for name in ("lab-ask", "lab-answer", "lab-write", "lab-written", "lab-unknown", "lab-known", "lab-add")
            ],
            *[
                dcc.Store(id=name)
                for name in ("lab-model-key", "lab-stamp", "lab-job", "lab-long", "lab-kind-defaults", "lab-wish")
            ],
            dcc.Store(id="lab-kept", storage_type="session"),
            dcc.Store(id="lab-versions", storage_type="local"),
            dcc.Store(id="lab-default-prompt", data=prompt),
            dcc.Store(id={"defaults": "lab"}, data=DEFAULTS),
            dcc.Interval(id="lab-tick", interval=1000),
            dcc.Download(id="lab-download"),
            _model_bar(suggested(run)),
            html.Div(
                [
                    html.Div([_prompts(), _edits(), _add()], className="lab-left"),
                    html.Div(_answer(), className="lab-right"),
                ],
                className="lab-columns",
            ),
        ],
        className="lab-page lab-empty",
        id="lab-page",
    )


def _model_bar(source: str) -> Any:
    return html.Section(
        [
            html.Div(html.Span("…", className="muted"), id="lab-model", className="lab-model", role="status"),
            html.Div(
                [
                    dmc.TextInput(
                        id="lab-source",
                        value=source,
                        size="xs",
                        w=220,
                        className="foreign",
                        debounce=False,
                        **named("Model: demo, a folder, a .gguf file or a Hub id"),
                    ),
                    button("Load", "lab-load", title="Load this model. A Hub id may be fetched; no code of it is run."),
                    button("Stop", "lab-stop", title="Stop what the model is doing", disabled=True),
                    button("Unload", "lab-unload", title="Let go of the model and its memory", disabled=True),
                ],
                className="lab-row",
            ),
        ],
        className="lab-bar",
        **named("Model"),
    )


def _prompts() -> Any:
    number = {"size": "xs", "debounce": 400, "hideControls": False}
    return html.Section(
        [
            _title("Prompts", "One a line; \\n within a line is a line break."),
            dmc.Textarea(
                id="lab-prompt",
                autosize=True,
                minRows=3,
                maxRows=10,
                className="foreign",
                styles={"input": {"fontFamily": "var(--mantine-font-family-monospace)", "fontSize": 13}},
                **named("Prompts, one a line"),
            ),
            html.Div(id="lab-prompt-note", className="muted"),
            html.Div(
                [
                    dmc.NumberInput(
                        id={"url": "tokens"},
                        label="Tokens written",
                        min=0,
                        max=MAX_WRITTEN,
                        allowDecimal=False,
                        **number,
                    ),
                    dmc.NumberInput(id={"url": "temperature"}, label="Temperature", min=0, max=5, step=0.1, **number),
                    dmc.NumberInput(id={"url": "seed"}, label="Seed", min=0, allowDecimal=False, **number),
                ],
                className="lab-row lab-thirds",
            ),
        ],
        className="lab-part",
    )


def _edits() -> Any:
    return html.Section(
        [
            html.Div(
                [
                    _title("Edits", "They act in this order; any page can add to them."),
                    html.Div(
                        [
                            button(html.Span("↶", **HIDDEN), "lab-undo", label="Undo (Ctrl Z)", disabled=True),
                            button(html.Span("↷", **HIDDEN), "lab-redo", label="Redo (Ctrl Shift Z)", disabled=True),
                            button("Clear", "lab-clear", title="Remove every edit"),
                        ],
                        className="lab-row",
                    ),
                ],
                className="lab-head",
            ),
            html.Ol(id="lab-edits", className="lab-edits", **named("Edits")),
            html.Div(id="lab-refused", role="alert"),
            html.Details(
                [html.Summary("JSON, Python, command line, versions"), *_exchange()],
                className="lab-more",
            ),
        ],
        className="lab-part",
    )


def _exchange() -> list[Any]:
    return [
        html.Div(
            [
                button("Download JSON", "lab-json"),
                button("Copy JSON", "lab-copy-json"),
                button("Copy as Python", "lab-copy-python"),
                button("Copy as command", "lab-copy-command"),
                html.Span(id="lab-copied", className="muted", role="status"),
            ],
            className="lab-row",
        ),
        dcc.Store(id="lab-text"),
        dmc.Textarea(
            id="lab-paste",
            placeholder='{"edits": [{"kind": "ablate", "layer": 3, "experts": [5]}]}',
            autosize=True,
            minRows=2,
            maxRows=6,
            label="An intervention as JSON",
            description="Edits with vectors, which no address can hold, stay in this tab and are not in its link.",
            size="xs",
            className="foreign",
        ),
        html.Div(
            [
                button("Take this JSON", "lab-take"),
                dcc.Upload(
                    html.Button("Open a file", type="button", className="lab-button"), id="lab-upload", multiple=False
                ),
            ],
            className="lab-row",
        ),
        html.Div(id="lab-paste-problem", role="alert"),
        html.Div(
            [
                dmc.TextInput(id="lab-version-name", size="xs", label="Keep this state as", w=180),
                button("Keep", "lab-version-keep"),
                dmc.Select(
                    id="lab-version",
                    data=[],
                    size="xs",
                    label="Go back to",
                    placeholder="nothing kept",
                    w=180,
                    clearable=True,
                ),
            ],
            className="lab-row lab-low",
        ),
    ]


def _add() -> Any:
    return html.Section(
        [
            _title("Add an edit", "Put it together, or type its line."),
            html.Div(
                [
                    dmc.Select(
                        id="lab-kind",
                        data=[{"value": kind.kind, "label": kind.kind.replace("_", " ")} for kind in edits],
                        value=KIND,
                        searchable=True,
                        allowDeselect=False,
                        label="Kind",
                        size="xs",
                        w=160,
                    ),
                    html.Div(id="lab-about", className="muted lab-about"),
                ],
                className="lab-row lab-top",
            ),
            html.Div(id="lab-fields", className="lab-fields"),
            html.Div(
                [
                    dmc.TextInput(
                        id="lab-line",
                        value="",
                        size="xs",
                        placeholder="ablate layer=3 experts=5 how=zero",
                        className="lab-line mono",
                        **named("The edit as one line"),
                    ),
                    button("Add", "lab-add-button", primary=True),
                ],
                className="lab-row",
            ),
            html.Div(id="lab-line-problem", role="alert"),
        ],
        className="lab-part",
    )


def _answer() -> list[Any]:
    return [
        html.Div(
            html.Span("Waiting for the model …", className="muted"),
            id="lab-state",
            className="lab-state",
            role="status",
        ),
        html.Section([_title("Effect on the prompts"), html.Div(id="lab-summary")], className="lab-part lab-needs"),
        html.Section([_title("Next token"), html.Div(id="lab-next")], className="lab-part lab-needs"),
        html.Section(
            [
                html.Div(
                    [
                        _title("Token by token"),
                        dmc.SegmentedControl(
                            id={"url": "tint"},
                            data=[{"value": value, "label": label} for value, label in TINTS],
                            size="xs",
                            **named("What colours the tokens"),
                        ),
                    ],
                    className="lab-head",
                ),
                html.Div(id="lab-legend", className="muted lab-legend"),
                html.Div(id="lab-tokens"),
                html.Div(id="lab-readout", className="toktip lab-readout", role="status"),
                html.Div(id="lab-table"),
            ],
            className="lab-part lab-needs",
        ),
        html.Section(
            [_title("Routing"), html.Div(id="lab-routing")], className="lab-part lab-needs", id="lab-routing-part"
        ),
        html.Section([_title("What it writes"), html.Div(id="lab-writing")], className="lab-part lab-needs"),
        _measure(),
    ]


def _measure() -> Any:
    return html.Section(
        [
            _title(
                "Controls, and a run to keep",
                "The same edits of other experts, heads, channels, directions or latents, drawn at random and matched.",
            ),
            html.Div(
                [
                    dmc.Select(
                        id="lab-texts",
                        data=[
                            {"value": "prompts", "label": "these prompts"},
                            {"value": "run", "label": "64 texts of the run"},
                            {"value": "demo", "label": "64 texts of the demo corpus"},
                        ],
                        value="prompts",
                        allowDeselect=False,
                        label="On",
                        size="xs",
                        w=210,
                    ),
                    dmc.NumberInput(id="lab-draws", value=5, min=0, max=50, label="Controls", size="xs", w=90),
                    dmc.NumberInput(
                        id="lab-continue", value=0, min=0, max=256, label="Tokens written", size="xs", w=110
                    ),
                    button("Run the controls", "lab-controls", primary=True),
                ],
                className="lab-row lab-low",
            ),
            html.Div(
                [
                    dmc.TextInput(id="lab-run-name", size="xs", label="Save as a run called", w=210),
                    button("Save as a run", "lab-save"),
                    html.Span(id="lab-save-note", className="muted"),
                ],
                className="lab-row lab-low",
            ),
            html.Div(id="lab-measure-problem", role="alert"),
            html.Div(id="lab-progress", role="status"),
            html.Div(id="lab-measured"),
        ],
        className="lab-part lab-needs",
    )


def button(
    text: Any,
    identity: str,
    *,
    title: str | None = None,
    label: str | None = None,
    primary: bool = False,
    disabled: bool = False,
) -> Any:
    """A plain button."""
    words = attributes(title=title or label)
    return html.Button(
        text,
        id=identity,
        type="button",
        disabled=disabled,
        className="lab-button primary" if primary else "lab-button",
        **words,
        **(named(label) if label else {}),
    )


def _title(title: str, note: str | None = None) -> Any:
    heading = [dmc.Title(title, order=2, className="section-title")]
    return html.Div([*heading, *([html.Div(note, className="muted")] if note else [])], className="lab-title")
