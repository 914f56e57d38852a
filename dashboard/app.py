"""The app: frame, pages and guards over one store."""

from __future__ import annotations

from pathlib import Path

import dash

from moescope.core.pages import pages
from moescope.dashboard import guards, kept, shell
from moescope.dashboard.answers import Answers
from moescope.dashboard.model_host import ModelHost
from moescope.dashboard.panel import panel_callbacks
from moescope.dashboard.services import Services, provide
from moescope.dashboard.work import Job, Work
from moescope.store.store import Store

DEFAULT_PORT = 8050


def create_app(store: Store, *, port: int = DEFAULT_PORT, model: str | None = None, why_not: str = "") -> dash.Dash:
    """The dashboard over a store, ready to serve.

    Args:
        store: open; where it is open for reading only, nothing can be recorded or saved from a page.
        port: where it will listen; requests that name another address are refused.
        model: what the lab loads, as `moescope.load` takes it; None leaves the choice to the page.
        why_not: why the store could not be opened for writing, for the pages that would write.

    Example:
        >>> import pathlib, tempfile
        >>> with Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     create_app(store).server.test_client().get("/", headers={"Host": "evil.example"}).status_code
        403
    """
    app = dash.Dash(
        "moescope.dashboard",
        title="moescope",
        update_title="",
        compress=True,
        serve_locally=True,
        enable_mcp=False,
        suppress_callback_exceptions=True,
        on_error=shell.report_failure,
        add_log_handler=False,
        assets_folder=str(Path(__file__).parent / "assets"),
    )
    app.server.config["COMPRESS_STREAMS"] = False  # files of assets/ are small, and flask-compress leaves them open
    answers = Answers(store)

    def forget(_job: Job) -> None:
        answers.forget()
        kept.forget_all()

    work = Work(after=forget)
    provide(app, Services(store, answers, ModelHost(model), work, not store.read_only, why_not))
    app.layout = shell.layout(store)
    shell.callbacks(app, store)
    panel_callbacks(app, store, answers)
    for page in pages:
        if page.callbacks is not None:
            page.callbacks(app, store)
    guards.guard(app.server, port=port, script_hashes=app.csp_hashes())
    return app
