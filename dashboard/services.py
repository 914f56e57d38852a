"""What the pages share besides the store: answers that are kept, work that runs on, the live model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import dash

from moescope.dashboard.answers import Answers
from moescope.dashboard.model_host import ModelHost
from moescope.dashboard.work import Work
from moescope.store.store import Store

_KEY = "moescope"


@dataclass(frozen=True)
class Services:
    """One set for each app.

    Attributes:
        store: the open store.
        answers: results of analyses, kept.
        models: the live model, which answers one request at a time.
        work: long work, on a thread of its own.
        writable: whether runs can be recorded into the store.
        why_not: where they cannot, the reason and what to do.
    """

    store: Store
    answers: Answers
    models: ModelHost
    work: Work
    writable: bool
    why_not: str = ""


def provide(app: dash.Dash, services: Services) -> None:
    """Make the services known to the app's pages."""
    app.server.config[_KEY] = services


def services_of(app: dash.Dash) -> Services:
    """The services of an app, for a page's callbacks."""
    return cast("Services", app.server.config[_KEY])
