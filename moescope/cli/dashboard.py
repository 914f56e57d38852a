"""`moescope dashboard`: look at a store in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moescope.cli.output import news
from moescope.core.errors import InputError


def dashboard(
    store: Annotated[Path, typer.Argument(help="The store.")] = Path("runs.duckdb"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes any free one.")] = 8050,
) -> None:
    """Open a store in the browser, on this machine only. Ctrl-C stops it.

    Example: moescope dashboard runs.duckdb
    """
    try:
        from moescope.dashboard.serve import serve
    except ImportError as missing:
        raise InputError(
            "the dashboard is not installed", found=str(missing), fix="pip install 'moescope[dashboard]'"
        ) from missing

    def tell(url: str, _server: object) -> None:
        typer.echo(url)
        news(f"the dashboard of {store} is open at {url}; Ctrl-C stops it")

    try:
        serve(store, port=port, ready=tell)
    except KeyboardInterrupt:
        news("stopped")
