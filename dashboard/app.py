"""The app: frame, pages and guards over one store."""

from __future__ import annotations

from pathlib import Path

import dash

from moescope.core.pages import pages
from moescope.dashboard import guards, shell
from moescope.store.store import Store

DEFAULT_PORT = 8050


def create_app(store: Store, *, port: int = DEFAULT_PORT) -> dash.Dash:
    """The dashboard over a store, ready to serve.

    Args:
        store: open, best read-only; the app never writes to it.
        port: where it will listen; requests that name another address are refused.

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
    app.layout = shell.layout(store)
    shell.callbacks(app, store)
    for page in pages:
        if page.callbacks is not None:
            page.callbacks(app, store)
    guards.guard(app.server, port=port, script_hashes=app.csp_hashes())
    return app
