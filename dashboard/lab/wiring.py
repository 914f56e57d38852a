"""The lab's callbacks: what the address asks for, forms and files, measurements."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

import dash
from dash import ALL, Input, Output, State, ctx

from moescope.core.edit import Edit
from moescope.core.edit_text import read_edit
from moescope.core.errors import InputError, MoescopeError
from moescope.core.intervention import Intervention
from moescope.dashboard import notices
from moescope.dashboard.browser import in_browser
from moescope.dashboard.lab import form, measured
from moescope.dashboard.lab.asking import Asking, prompts_of
from moescope.dashboard.lab.bench import Bench
from moescope.dashboard.lab.lines import as_command, as_python, for_address, read_all, row, row_of
from moescope.dashboard.lab.measuring import Asked, Measuring, texts_for
from moescope.dashboard.lab.model_part import choose_demo
from moescope.dashboard.model_loading import no_model
from moescope.dashboard.model_requests import Replaced
from moescope.dashboard.services import Services
from moescope.store.store import Store

_MOST_BYTES = 20_000_000


def callbacks(app: dash.Dash, store: Store, services: Services) -> None:
    """Register everything but the model bar."""
    bench = Bench(services.models, store)
    _browser(app)
    _answers(app, store, services, Asking(services.models, bench))
    _adding(app, store, services)
    _exchange(app, store, services)
    _measuring(app, store, services, Measuring(services, bench))


def _browser(app: dash.Dash) -> None:
    """What runs in the browser."""
    in_browser(
        app,
        "ask",
        Output("lab-ask", "data"),
        Output("lab-unknown", "data"),
        Input("url", "search"),
        Input("lab-stamp", "data"),
        Input("lab-kept", "data"),
        Input("lab-long", "data"),
        State("lab-default-prompt", "data"),
        space="lab",
    )
    in_browser(app, "known", Input("lab-known", "data"), space="lab")
    in_browser(app, "show", Input("lab-answer", "data"), Input({"url": "tint"}, "value"), space="lab")
    in_browser(app, "show_written", Input("lab-written", "data"), space="lab")
    in_browser(
        app,
        "fill_prompt",
        Output("lab-prompt", "value"),
        Input("url", "search"),
        Input("lab-default-prompt", "data"),
        State("lab-prompt", "value"),
        space="lab",
    )
    in_browser(app, "type_prompt", Input("lab-prompt", "value"), State("lab-default-prompt", "data"), space="lab")
    in_browser(app, "added", Input("lab-add", "data"), space="lab")
    in_browser(
        app,
        "compose",
        Output("lab-line", "value"),
        Input({"lab-field": ALL}, "value"),
        State({"lab-field": ALL}, "id"),
        State("lab-kind-defaults", "data"),
        space="lab",
    )
    in_browser(app, "copy", Output("lab-copied", "children"), Input("lab-text", "data"), space="lab")
    in_browser(
        app,
        "versions",
        Output("lab-versions", "data"),
        Output("lab-version", "data"),
        Input("lab-version-keep", "n_clicks"),
        Input("lab-versions", "modified_timestamp"),
        State("lab-version-name", "value"),
        State("lab-versions", "data"),
        space="lab",
    )
    in_browser(app, "go_back", Input("lab-version", "value"), State("lab-versions", "data"), space="lab")


def _answers(app: dash.Dash, store: Store, services: Services, asking: Asking) -> None:
    @app.callback(Output("lab-answer", "data"), Input("lab-ask", "data"), State("page-run", "data"))
    def answer(ask: dict[str, Any] | None, run: str | None) -> Any:
        if ask is None:
            raise dash.exceptions.PreventUpdate
        choose_demo(services.models, store.run(run).model if run else None)
        try:
            return asking.answer(ask)
        except Replaced:
            raise dash.exceptions.PreventUpdate from None

    @app.callback(Output("lab-written", "data"), Input("lab-write", "data"))
    def write(ask: dict[str, Any] | None) -> Any:
        if ask is None:
            raise dash.exceptions.PreventUpdate
        try:
            return asking.writes(ask)
        except Replaced:
            raise dash.exceptions.PreventUpdate from None

    @app.callback(Output("lab-known", "data"), Input("lab-unknown", "data"))
    def know(lines: list[str] | None) -> Any:
        if not lines:
            raise dash.exceptions.PreventUpdate
        return [row(line) for line in lines]


def _adding(app: dash.Dash, store: Store, services: Services) -> None:
    @app.callback(
        Output("lab-fields", "children"),
        Output("lab-about", "children"),
        Output("lab-kind-defaults", "data"),
        Input("lab-kind", "value"),
        Input("lab-model-key", "data"),
        State("page-run", "data"),
        State("lab-kind-defaults", "data"),
    )
    def fields(kind: str | None, _model: str | None, run: str | None, now: dict[str, Any] | None) -> tuple[Any, ...]:
        limits = form.extent(services.models, store.run(run) if run else None)
        made_for = {"kind": kind, "limits": [limits.layers, limits.experts, limits.heads]}
        if kind is None or (now and {name: now[name] for name in made_for} == made_for):
            raise dash.exceptions.PreventUpdate
        return form.fields(kind, limits, store), form.about(kind), {**made_for, "defaults": form.defaults_of(kind)}

    @app.callback(
        Output("lab-add", "data"),
        Output("lab-line-problem", "children"),
        Input("lab-wish", "data"),
        prevent_initial_call=True,
    )
    def add(wish: dict[str, Any] | None) -> tuple[Any, Any]:
        if wish is None:
            raise dash.exceptions.PreventUpdate
        try:
            return {**_taken([read_edit(str(wish["line"]))]), "stamp": wish["stamp"]}, None
        except MoescopeError as refused:
            return dash.no_update, notices.refusal(refused)


def _exchange(app: dash.Dash, store: Store, services: Services) -> None:
    @app.callback(
        Output("lab-add", "data", allow_duplicate=True),
        Output("lab-paste-problem", "children"),
        Input("lab-take", "n_clicks"),
        Input("lab-upload", "contents"),
        State("lab-paste", "value"),
        prevent_initial_call=True,
    )
    def take(clicks: int | None, contents: str | None, pasted: str | None) -> tuple[Any, Any]:
        if not (clicks or contents):
            raise dash.exceptions.PreventUpdate
        try:
            text = _read(contents or "") if ctx.triggered_id == "lab-upload" else pasted or ""
            edits = Intervention.from_json(text).edits
            return {**_taken(edits), "replace": True, "stamp": f"{clicks} {len(text)} {hash(text)}"}, None
        except MoescopeError as refused:
            return dash.no_update, notices.refusal(refused)

    @app.callback(
        Output("lab-text", "data"),
        Output("lab-download", "data"),
        Output("lab-paste-problem", "children", allow_duplicate=True),
        Input("lab-json", "n_clicks"),
        Input("lab-copy-json", "n_clicks"),
        Input("lab-copy-python", "n_clicks"),
        Input("lab-copy-command", "n_clicks"),
        State("lab-ask", "data"),
        prevent_initial_call=True,
    )
    def hand_out(*given: Any) -> tuple[Any, Any, Any]:
        *clicks, ask = given
        if not any(clicks) or ask is None:
            raise dash.exceptions.PreventUpdate
        pressed, source = ctx.triggered_id, services.models.source
        try:
            intervention = _intervention(ask)
            if pressed == "lab-json":
                name = "intervention.json"
                return dash.no_update, {"content": intervention.to_json(indent=2) + "\n", "filename": name}, None
            texts = {
                "lab-copy-json": lambda: intervention.to_json(indent=2),
                "lab-copy-python": lambda: as_python(intervention, source),
                "lab-copy-command": lambda: as_command(intervention, source, str(store.path)),
            }
            return {"text": texts[str(pressed)](), "stamp": sum(n or 0 for n in clicks)}, dash.no_update, None
        except MoescopeError as refused:
            return dash.no_update, dash.no_update, notices.refusal(refused)


def _measuring(app: dash.Dash, store: Store, services: Services, measuring: Measuring) -> None:
    @app.callback(
        Output("lab-job", "data"),
        Output("lab-measure-problem", "children"),
        Input("lab-controls", "n_clicks"),
        Input("lab-save", "n_clicks"),
        State("lab-ask", "data"),
        State("lab-texts", "value"),
        State("lab-draws", "value"),
        State("lab-continue", "value"),
        State("lab-run-name", "value"),
        State("page-run", "data"),
        prevent_initial_call=True,
    )
    def start(
        controls: int | None,
        save: int | None,
        ask: dict[str, Any] | None,
        choice: str,
        draws: int | str | None,
        tokens: int | str | None,
        name: str | None,
        run: str | None,
    ) -> tuple[Any, Any]:
        if not (controls or save) or ask is None:
            raise dash.exceptions.PreventUpdate
        try:
            source = services.models.source
            if source is None:
                raise no_model()
            texts = texts_for(choice, prompts_of(str(ask.get("prompt") or "")), store, run)
            asked = Asked(_intervention(ask), tuple(texts), int(draws or 0), int(tokens or 0), source)
            if not asked.intervention.edits:
                raise InputError("there is no edit to measure", fix="add one")
            saving = ctx.triggered_id == "lab-save"
            job = measuring.save(asked, name or "") if saving else measuring.controls(asked)
            return {"number": job.number}, None
        except MoescopeError as refused:
            return dash.no_update, notices.refusal(refused)

    measured.callbacks(app, services, measuring)


def _intervention(ask: Mapping[str, Any]) -> Intervention:
    """The edits of a request; all of them must be readable."""
    edits, problems = read_all(list(ask.get("edits") or ()), ask.get("kept"))
    if wrong := next((problem for problem in problems if problem), None):
        raise InputError(**wrong)
    return Intervention([edit for edit in edits if edit is not None])


def _taken(edits: Sequence[Edit]) -> dict[str, Any]:
    """Edits for the browser's list: lines for the address, and what stays in the tab."""
    lines, kept = for_address(edits)
    rows = [row_of(edit) for edit in kept]
    return {"lines": lines, "kept": {"json": Intervention(kept).to_json(), "rows": rows} if kept else None}


def _read(contents: str) -> str:
    """The text of an uploaded file."""
    if len(contents) > _MOST_BYTES:
        raise InputError("the file is too large", expected=f"at most {_MOST_BYTES // 10**6} MB")
    try:
        return base64.b64decode(contents.partition(",")[2], validate=True).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError) as broken:
        raise InputError("the file is no intervention", expected="JSON in UTF-8", found=str(broken)) from broken
