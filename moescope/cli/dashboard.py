"""`moescope dashboard`: look at a store in the browser."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from moescope.cli.flags import Json, Store
from moescope.cli.output import as_json, news, said
from moescope.core.errors import InputError

_LOCAL = "127.0.0.1"


def dashboard(
    store: Store = Path("runs.duckdb"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes any free one.")] = 8050,
    model: Annotated[
        str | None,
        typer.Option(help="What the lab loads, as `moescope profile` takes it.", show_default="chosen there"),
    ] = None,
    read_only: Annotated[
        bool,
        typer.Option(
            "--read-only", help="Record and save nothing, so that other programs may read the store meanwhile."
        ),
    ] = False,
    new: Annotated[bool, typer.Option("--new", help="Make an empty store where there is none.")] = False,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on; any but this machine's own needs a token, made where none is given."),
    ] = _LOCAL,
    token: Annotated[
        str | None,
        typer.Option(
            help="Secret that every request must show.",
            hide_input=True,
            envvar="MOESCOPE_TOKEN",
            show_default="none on this machine",
            show_envvar=True,
        ),
    ] = None,
    host_name: Annotated[
        list[str] | None,
        typer.Option(help="Host name that leads here, besides this machine's own, repeatable.", show_default="none"),
    ] = None,
    json: Json = False,
) -> None:
    """Open a store in the browser. Ctrl-C stops it.

    The store is opened for writing where it can be, so that pages can record into it; then no other program can open it.

    Example: moescope dashboard runs.duckdb
    """
    try:
        from moescope.dashboard.access import new_token
        from moescope.dashboard.serve import serve
    except ImportError as missing:
        raise InputError(
            "the dashboard is not installed", found=str(missing), fix="pip install 'moescope[dashboard]'"
        ) from missing

    def tell(url: str, _server: object) -> None:
        as_json({"url": url}) if json else said(url)
        news(f"the dashboard of {store} is open at {url.split('?', maxsplit=1)[0]}; Ctrl-C stops it")
        if host != _LOCAL:
            news("whoever has the address above, with its token, can use it; nothing on the way is encrypted")

    if host != _LOCAL and not token:
        token = new_token()
    before = signal.signal(signal.SIGTERM, _interrupted)
    try:
        serve(
            store,
            host=host,
            port=port,
            token=token or None,
            names=host_name or (),
            model=model,
            read_only=read_only,
            new=new,
            ready=tell,
            tell=news,
        )
    except KeyboardInterrupt:
        news("stopped")
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt
