"""A tab of the routing page: its question, its fields, and a place for each of its panels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dash_mantine_components as dmc
from dash import dcc, html

from moescope.core.analysis import PROBE_OF_TABLE, analyses
from moescope.core.errors import InputError
from moescope.dashboard import notices, numbers
from moescope.dashboard.panel import panel
from moescope.dashboard.records import choices, labels, routers
from moescope.dashboard.routing_page import simulators
from moescope.dashboard.routing_page.controls import fields
from moescope.dashboard.routing_page.tabs import TABS, Shown, Tab
from moescope.dashboard.unrecorded import command
from moescope.dashboard.url_state import ViewState, link
from moescope.store.run import Run

SLOW = 2.5
"""Seconds beyond which a panel is computed only when asked for."""

_MEASURED = 25e6  # choices for which `Shown.seconds` was measured


def tabs_of(run: Run) -> list[Tab]:
    """The tabs that a run has something for."""
    return [tab for tab in TABS if tab.needs is None or run.rows(tab.needs)]


def chosen(run: Run, state: ViewState) -> Tab:
    """The tab of an address, the first one where it names none. Raises `InputError` for one there is not."""
    name = state.given("tab") or TABS[0].name
    offered = tabs_of(run)
    for tab in offered:
        if tab.name == name:
            return tab
    for tab in TABS:
        if tab.name == name and tab.needs is not None:
            raise InputError(
                f"the tab {tab.title!r} needs records that run {run.name!r} does not have",
                expected=f"rows in {tab.needs}",
                fix=f"record them with `{recorded_by(run, [tab.needs])}`",
            )
    raise InputError(f"there is no tab {name!r}", expected=", ".join(tab.name for tab in offered))


def tab_body(run: Run, state: ViewState, tab: Tab, asked: set[str]) -> Any:
    """Everything below the row of tabs.

    Args:
        run: whose decisions.
        state: of the address.
        tab: what to show.
        asked: analyses that someone has asked for in spite of what they take.
    """
    known, counted = routers(run), choices(run)
    labelled = bool(labels(run))
    parts: list[Any] = [
        dcc.Store(
            id={"defaults": f"routing-{tab.name}"}, data={control.name: control.start for control in tab.controls}
        ),
        dmc.Text(tab.question, className="tab-question"),
    ]
    if tab.controls:
        parts.append(fields(tab.controls, known, state, labelled=labelled))
    parts += [_place(run, state, shown, counted, asked) for shown in tab.panels]
    return html.Div(parts)


def seconds(shown: Shown, counted: int) -> float:
    """What a panel takes for so many choices, about."""
    return shown.seconds * counted / _MEASURED


def identity(shown: Shown) -> str:
    """Of the panel of an analysis."""
    return "routing-" + shown.analysis.replace("_", "-")


def place(analysis: Any, name: str) -> dict[str, Any]:
    """The id of what stands round the panel of an analysis: its slot, or the button that computes it."""
    return {"routing": analysis, "part": name}


def _place(run: Run, state: ViewState, shown: Shown, counted: int, asked: set[str]) -> Any:
    parts: list[Any] = [dmc.Text(analyses[shown.analysis].summary.replace("`", ""), className="panel-question")]
    if missing := analyses[shown.analysis].missing(run):
        return html.Div([*parts, not_recorded(run, missing, analyses[shown.analysis].needs)], className="panel-place")
    wait = seconds(shown, counted) > SLOW and shown.analysis not in asked
    content = ask_first(shown, counted) if wait else made(run, state, shown, counted)
    parts.append(html.Div(content, id=place(shown.analysis, "slot")))
    if shown.analysis == "paths":
        parts.append(html.Div(id="path-list"))
    return html.Div(parts, className="panel-place")


def made(run: Run, state: ViewState, shown: Shown, counted: int, *, eager: bool = False) -> Any:
    """The panel of an analysis, its simulator before it, with words for the time it takes where that is long."""
    parts: list[Any] = []
    takes = seconds(shown, counted)
    if takes > SLOW:
        words = f"Computing over all decisions; this takes about {takes:.0f} s. The rest of the page stays in use."
        parts.append(html.Div(words, className="computing", role="status"))
    if shown.simulator:
        parts.append(simulators.simulator(run, state, shown.simulator, routers(run)))
    parts.append(
        panel(
            identity(shown),
            shown.analysis,
            [run],
            given={**simulators.given(run, shown.simulator), **starts(shown), **shown.given},
            wanted={name: name for name in shown.controls},
            click=shown.click,
            height=shown.height,
            eager=eager,
        )
    )
    return html.Div(parts, className="panel-slow" if takes > SLOW else None)


def starts(shown: Shown) -> dict[str, Any]:
    """What the fields of a panel say at their start, where its analysis would take something else."""
    fields = next((tab.controls for tab in TABS if shown in tab.panels), ())
    parameters = analyses[shown.analysis].parameters
    return {
        control.name: control.start
        for control in fields
        if control.name in shown.controls
        and control.start != ""
        and parameters[control.name].parse(str(control.start)) != parameters[control.name].default
    }


def ask_first(shown: Shown, counted: int) -> Any:
    """In place of a panel that takes long: what it would cost, and a button."""
    about = f"about {seconds(shown, counted):.0f} s"
    return html.Div(
        [
            dmc.Text(
                f"This run has {numbers.short_count(counted)} choices; all of them are used, which takes {about}."
            ),
            dmc.Button(f"Compute ({about})", id=place(shown.analysis, "compute"), size="xs", variant="default"),
        ],
        className="ask-first",
        style={"minHeight": 120},
    )


def recorded_by(run: Run, tables: Sequence[str]) -> str:
    """The command that records tables, and the choices of routers with them, in a new run of the same model.

    Vectors need a site: that after the layer before the first router that has one, from which its choices can be read.
    """
    probes = dict.fromkeys(("routing", *(PROBE_OF_TABLE.get(table, table) for table in tables)))
    words = f"profile {{model}} --probe {','.join(probes)}"
    if "activations" in tables:
        before = next((router.layer - 1 for router in routers(run) if router.layer > 0), 0)
        words += f" --site blocks.{before}.hook_resid_post"
    return command(run, words, model=True)


def not_recorded(run: Run, missing: Sequence[str], needs: Sequence[str]) -> Any:
    """In place of a panel whose records the run lacks.

    Args:
        run: that lacks them.
        missing: tables without rows.
        needs: every table of the analysis: what records it makes a run of its own, which has nothing of this one.
    """
    tables = ", ".join(missing)
    return html.Div(
        [
            dmc.Text(["Not recorded: this needs rows in ", dmc.Code(tables), "."], className="muted"),
            dmc.Group(
                [
                    dmc.Text("Record it from a model:", className="muted"),
                    dmc.Code(recorded_by(run, needs), className="command foreign"),
                ],
                gap=6,
            ),
        ],
        className="not-recorded",
    )


def empty_state(run: Run) -> Any:
    """What a run without routers, or without their choices, has instead of this page."""
    model = "{model}" if routers(run) else "demo"
    return notices.empty(
        "No routers",
        f"{run.name} is a run of a dense model, or of one whose routing was not recorded: there are no decisions to look at. "
        "A model with experts, recorded with the probe routing, fills this page.",
        command=command(run, f"profile {model} --probe tokens,routing,experts", model=True),
    )


def tab_links(run: Run, state: ViewState, chosen_name: str) -> list[Any]:
    """The row of tabs as links; in the browser they change the address without leaving the page."""
    here = state.selection()
    links = []
    for tab in tabs_of(run):
        more: dict[str, Any] = {"data-tab": tab.name}
        if tab.name == chosen_name:
            more["aria-current"] = "page"
        href = link("/routing", here.with_rest(tab=None if tab is TABS[0] else tab.name))
        links.append(html.A(tab.title, href=href, className="tab-link", **more))
    return links
