"""Serving the app: on this machine, or beyond it to whoever has the token."""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import duckdb
from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server

from moescope.core.errors import InputError, StoreError
from moescope.dashboard import guards
from moescope.dashboard.access import Access, checked_token, own_names
from moescope.dashboard.app import DEFAULT_PORT, create_app
from moescope.dashboard.services import Services, services_of
from moescope.store.store import Store

HOST = "127.0.0.1"
MEMORY = "1GiB"
_LAST_PORT = 65535
_PATIENCE = 20.0  # seconds that work has for ending in order
_LOG = logging.getLogger("moescope.dashboard")


class _QuietHandler(WSGIRequestHandler):
    """Handles requests without a line on stderr for each."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say nothing."""


class _Requests:
    """Counts requests that are being answered: the store is closed after the last of them.

    Args:
        app: answers them.
    """

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self._app, self._now, self._changed = app, 0, threading.Condition()

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        with self._changed:
            self._now += 1
        try:
            return self._app(environ, start)
        finally:
            with self._changed:
                self._now -= 1
                self._changed.notify_all()

    def wait(self, seconds: float) -> None:
        """Until none is left, at most so long."""
        with self._changed:
            self._changed.wait_for(lambda: self._now == 0, seconds)


def serve(
    store_path: str | Path,
    *,
    host: str = HOST,
    port: int = DEFAULT_PORT,
    token: str | None = None,
    names: Sequence[str] = (),
    model: str | None = None,
    read_only: bool = False,
    new: bool = False,
    ready: Callable[[str, BaseWSGIServer], None] | None = None,
    tell: Callable[[str], None] = _LOG.info,
) -> None:
    """Serve the dashboard over a store until interrupted.

    The store is opened for writing where it can be, so that pages can record into it, and for reading otherwise; in both
    cases locked: no query reaches a file outside it. While it is open for writing, no other program can open it.

    Args:
        store_path: the store's file.
        host: the address to listen on; any but 127.0.0.1 needs a token.
        port: where to listen; 0 takes any free one.
        token: every request must show it: by a cookie, set by `?token=` in the first address.
        names: host names that lead here, besides this machine's own and addresses in digits.
        model: what the lab loads, as `moescope.load` takes it.
        read_only: open the store for reading, so that other readers may have it open too.
        new: make the store where there is none.
        ready: called once the server listens, with the URL and the server, whose `shutdown()` ends it from another thread.
        tell: news: why the store is open for reading only, and what is waited for at the end.

    Raises:
        StoreError: the store cannot be opened.
        InputError: another host without a token, a token that is too short, or the port is taken.
    """
    if host != HOST and token is None:
        raise InputError(
            f"the dashboard does not bind {host} without a token",
            expected=HOST,
            fix="give one (--token), or reach it from elsewhere through an SSH tunnel",
        )
    access = None if token is None else Access(checked_token(token), (*own_names(), *names))
    store, why_not = open_store(store_path, read_only=read_only, new=new)
    with store, _listen(host, port) as listening:
        if why_not and not read_only:
            tell(f"the store is open for reading only: {why_not}")
        bound = int(listening.getsockname()[1])
        app = create_app(store, port=bound, model=model, why_not=why_not)
        if access is not None:
            guards.open_to(app.server, access)
        requests = app.server.wsgi_app = _Requests(app.server.wsgi_app)
        server = make_server(
            host, bound, app.server, threaded=True, request_handler=_QuietHandler, fd=listening.fileno()
        )
        try:
            if ready is not None:
                ready(url(host, bound, token), server)
            server.serve_forever()
        finally:
            server.server_close()
            _end_work(services_of(app), tell)
            requests.wait(_PATIENCE)
            _close(store)


def open_store(path: str | Path, *, read_only: bool = False, new: bool = False) -> tuple[Store, str]:
    """The store for the app, closed in on itself; and why nothing can be written into it, "" where it can.

    Args:
        path: the file.
        read_only: do not try to write.
        new: make it where there is none; otherwise a missing file is refused, since it is a mistyped name more often.

    Raises:
        StoreError: it cannot be opened in either way; of an older version, with the command that upgrades it.
    """
    path = Path(path)
    if not read_only and not new and not path.exists():
        raise StoreError(
            f"there is no store at {path}",
            fix="check the path, record into it (moescope profile … --store), or make an empty one with --new",
        )
    if read_only:
        why = "the dashboard was started with --read-only; start it without, and it records and saves"
        return Store(path, read_only=True, memory=MEMORY), why
    try:
        return Store(path, locked=True, memory=MEMORY), ""
    except StoreError as refused:
        try:
            store = Store(path, read_only=True, memory=MEMORY)
        except StoreError:
            raise refused from None
        return store, _why_not(refused)


def url(host: str, port: int, token: str | None) -> str:
    """The address to open: of this machine where it listens on all of its addresses."""
    shown = f"[{host}]" if ":" in host else host
    if host in ("0.0.0.0", "::"):  # noqa: S104  compared, not bound
        shown = socket.gethostname()
    return f"http://{shown}:{port}/" + (f"?token={quote(token, safe='')}" if token else "")


def _why_not(refused: StoreError) -> str:
    parts = [refused.problem, refused.found, refused.fix]
    return "; ".join(part for part in parts if part)


def _end_work(services: Services, tell: Callable[[str], None]) -> None:
    """Let work that is under way end in order, so that the store is closed with whole records."""
    for job in services.work.jobs():
        services.work.cancel(job.number)
    if services.work.busy():
        tell(f"stopping what is under way; at most {_PATIENCE:.0f} s, Ctrl-C ends it at once")
    end = time.monotonic() + _PATIENCE
    while services.work.busy() and time.monotonic() < end:
        time.sleep(0.05)
    if services.models.status().state in ("loading", "busy"):
        tell("stopping the model")
        services.models.stop()


def _close(store: Store) -> None:
    """Close the store, which something may use for a moment yet."""
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            return store.close()
        except duckdb.Error:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= _LAST_PORT:
        raise InputError(f"cannot listen on port {port}", expected=f"1024 to {_LAST_PORT}, or 0 for any free one")
    both = host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, dualstack_ipv6=both
        )
    except OSError as refused:
        raise _explained(host, port, refused) from refused


def _explained(host: str, port: int, refused: OSError) -> InputError:
    if refused.errno == errno.EADDRINUSE:
        fix = f"close it, or choose another port: --port {port + 1 if port < _LAST_PORT else 0}"
        return InputError(f"port {port} is in use by another program", fix=fix)
    if refused.errno == errno.EACCES:
        return InputError(
            f"port {port} may not be used without more rights", fix="choose one from 1024, for instance --port 8050"
        )
    if refused.errno == errno.EADDRNOTAVAIL or isinstance(refused, socket.gaierror):
        return InputError(
            f"{host} is no address of this machine",
            found=str(refused),
            fix="choose one that it has, or 0.0.0.0 for all of them",
        )
    return InputError(f"cannot listen on port {port}", found=str(refused), fix="choose another with --port")
