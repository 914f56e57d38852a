"""Serving the app on this machine, and only to this machine."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from pathlib import Path

from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from moescope.core.errors import InputError
from moescope.dashboard.app import DEFAULT_PORT, create_app
from moescope.store.store import Store

HOST = "127.0.0.1"
_LAST_PORT = 65535


class _QuietHandler(WSGIRequestHandler):
    """Handles requests without a line on stderr for each."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say nothing."""


def serve(
    store_path: str | Path,
    *,
    host: str = HOST,
    port: int = DEFAULT_PORT,
    ready: Callable[[str, BaseWSGIServer], None] | None = None,
) -> None:
    """Serve the dashboard over a store until interrupted.

    The store is opened read-only, so that other readers may have it open too.

    Args:
        store_path: the store's file.
        host: 127.0.0.1, the only address it binds.
        port: where to listen; 0 takes any free one.
        ready: called once the server listens, with the URL and the server, whose `shutdown()` ends it from another thread.

    Raises:
        StoreError: the store cannot be opened.
        InputError: another host, or the port is taken.
    """
    if host != HOST:
        raise InputError(
            f"the dashboard does not bind {host}", expected=HOST, fix="reach it from elsewhere through an SSH tunnel"
        )
    with Store(store_path, read_only=True) as store, _listen(port) as listening:
        bound = int(listening.getsockname()[1])
        app = create_app(store, port=bound)
        server = make_server(
            HOST, bound, app.server, threaded=True, request_handler=_QuietHandler, fd=listening.fileno()
        )
        try:
            if ready is not None:
                ready(f"http://{HOST}:{bound}/", server)
            server.serve_forever()
        finally:
            server.server_close()


def _listen(port: int) -> socket.socket:
    if not 0 <= port <= _LAST_PORT:
        raise InputError(f"cannot listen on port {port}", expected=f"1024 to {_LAST_PORT}, or 0 for any free one")
    try:
        return socket.create_server((HOST, port))
    except OSError as refused:
        raise _explained(port, refused) from refused


def _explained(port: int, refused: OSError) -> InputError:
    if refused.errno == errno.EADDRINUSE:
        fix = f"close it, or choose another port: --port {port + 1 if port < _LAST_PORT else 0}"
        return InputError(f"port {port} is in use by another program", fix=fix)
    if refused.errno == errno.EACCES:
        return InputError(
            f"port {port} may not be used without more rights", fix="choose one from 1024, for instance --port 8050"
        )
    return InputError(f"cannot listen on port {port}", found=str(refused), fix="choose another with --port")
