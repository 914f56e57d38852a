"""Who may talk to the app: this machine's own browser, on the app's own pages; elsewhere, whoever has the token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast
from urllib.parse import urlsplit

from flask import Flask, Response, request

from moescope.dashboard.access import Access

_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_ACCESS = "moescope-access"
_HTTP = 80


def allowed_hosts(port: int) -> frozenset[str]:
    """The values of the Host header that name this app; any other comes from a page that re-pointed its own name here."""
    names = ("127.0.0.1", "localhost")
    bare = names if port == _HTTP else ()  # browsers leave out the port that http has by itself
    return frozenset({*(f"{name}:{port}" for name in names), *bare})


def open_to(server: Flask, access: Access) -> None:
    """Let requests from elsewhere in, under the app's own names and with its token; without it, none from here either."""
    server.config[_ACCESS] = access


def guard(server: Flask, *, port: int, script_hashes: Sequence[str]) -> None:
    """Refuse foreign hosts and foreign posts, and let pages load and call nothing but this app.

    Args:
        server: the Flask server behind the app.
        port: where the app listens.
        script_hashes: of the inline scripts that the app's own index page carries.
    """
    hosts = allowed_hosts(port)

    @server.before_request
    def refuse_strangers() -> Response | None:
        access = cast("Access | None", server.config.get(_ACCESS))
        host = request.headers.get("Host", "").lower()
        if not (host in hosts if access is None else access.answers_to(host)):
            return Response(
                "403: this app answers only to its own address on this machine."
                if access is None
                else "403: this app does not answer to that name; start it with --name to add one.",
                403,
                mimetype="text/plain",
            )
        # Behind a program that adds encryption, pages of this app come by https.
        origins = {f"http://{own}" for own in hosts} if access is None else {f"http://{host}", f"https://{host}"}
        if request.method not in _READING and not _own(origins):
            return Response("403: a page of another origin tried to use this app.", 403, mimetype="text/plain")
        return None if access is None else access.refusal(request, port)

    policy = "; ".join(
        (
            "default-src 'self'",
            f"script-src 'self' {' '.join(script_hashes)}",
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data: blob:",
            "font-src 'self' data:",
            "object-src 'none'",
            "base-uri 'none'",
            "form-action 'self'",
            "frame-ancestors 'none'",
        )
    )

    @server.after_request
    def add_policy(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = policy
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "same-origin"
        return response


def _own(origins: set[str]) -> bool:
    """Whether a changing request comes from the app's own pages; browsers always send an Origin with these."""
    origin = request.headers.get("Origin")
    if origin is not None:
        return origin.lower() in origins
    referrer = urlsplit(request.headers.get("Referer", ""))
    return f"{referrer.scheme}://{referrer.netloc}".lower() in origins
