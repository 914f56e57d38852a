"""The lab: a live model, changed by hand, that answers at once."""

from __future__ import annotations

from typing import Any

import dash

from moescope.core.pages import Page, pages
from moescope.dashboard.lab import model_part, wiring
from moescope.dashboard.lab.view import page
from moescope.dashboard.services import services_of
from moescope.dashboard.url_state import ViewState
from moescope.store.run import Run
from moescope.store.store import Store


def layout(run: Run | None, state: ViewState) -> Any:
    """Model, prompts and edits on the left, what follows from them on the right."""
    return page(run, state)


def callbacks(app: dash.Dash, store: Store) -> None:
    """Address → request of the model → what the browser paints; forms, files, measurements."""
    services = services_of(app)
    model_part.callbacks(app, services)
    wiring.callbacks(app, store, services)


pages.add(
    "lab",
    Page(
        "Lab",
        "/lab",
        "Change",
        50,
        "Prompts on the live model, unedited and under the edits of your selection, side by side.",
        layout,
        callbacks,
        needs_run=False,
    ),
)
