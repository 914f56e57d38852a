"""The token that opens the app where it listens beyond this machine, and the names it answers to there."""

from __future__ import annotations

import hashlib
import hmac
import html
import ipaddress
import secrets
import socket
from dataclasses import dataclass
from urllib.parse import urlencode, urlsplit

from flask import Request, Response

from moescope.core.errors import InputError

SHORTEST_TOKEN = 12
_PAGE = (
    "<!doctype html><html lang=en><meta charset=utf-8><title>moescope</title>{head}"
    "<body style='font: 16px/24px system-ui, sans-serif; max-width: 36em; margin: 12vh auto; padding: 0 1em'>{body}</body></html>"
)
_ASK = (
    "<h1 style='font-size: 20px'>This dashboard needs its token</h1>"
    "<p>{said}Open the address that was printed where it was started, or type the token.</p>"
    "<form method=get action='{action}'><label>Token <input type=password name=token autofocus required></label> "
    "<button>Open</button></form>"
)


@dataclass(frozen=True)
class Access:
    """Who may talk to an app that listens beyond this machine: whoever has the token, under a name that is the app's.

    Attributes:
        token: the secret; every request must show it.
        names: host names that lead here, besides every address in digits: a page elsewhere may point its own name at this
            machine, but not an address.

    Example:
        >>> Access("a long enough secret", names=("lab",)).answers_to("lab:8050")
        True
        >>> Access("a long enough secret").answers_to("evil.example")
        False
    """

    token: str
    names: tuple[str, ...] = ()

    def answers_to(self, host: str) -> bool:
        """Whether a Host header names this app."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        if name in {"localhost", *(own.lower().rstrip(".") for own in self.names)}:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def cookie(self) -> str:
        """What a browser keeps instead of the token."""
        return hmac.new(self.token.encode(), b"moescope dashboard", hashlib.sha256).hexdigest()

    def shown_by(self, request: Request, port: int) -> bool:
        """Whether the request carries the cookie."""
        return _same(request.cookies.get(cookie_name(port), ""), self.cookie())

    def refusal(self, request: Request, port: int) -> Response | None:
        """None where the request may pass; else the page that takes the token, or, given it, sets the cookie."""
        given = request.args.get("token") if request.method == "GET" else None
        if given is not None and _same(given, self.token):
            return self._welcome(request, port)
        if self.shown_by(request, port):
            return None
        said = "" if given is None else "That is not it. "
        body = _ASK.format(said=said, action=html.escape(_path(request)))
        return Response(_PAGE.format(head="", body=body), 401, mimetype="text/html")

    def _welcome(self, request: Request, port: int) -> Response:
        """Set the cookie and go on without the token in the address.

        A page that goes on by itself, not a redirect: browsers leave a strict cookie out of a redirect that began elsewhere.
        """
        rest = urlencode([(name, value) for name, value in request.args.items(multi=True) if name != "token"])
        target = html.escape(_path(request) + (f"?{rest}" if rest else ""))
        head = f"<meta http-equiv=refresh content='0; url={target}'>"
        answer = Response(
            _PAGE.format(head=head, body=f"<a href='{target}'>Open the dashboard</a>"), mimetype="text/html"
        )
        answer.set_cookie(cookie_name(port), self.cookie(), httponly=True, samesite="Strict", path="/")
        answer.headers["Cache-Control"] = "no-store"
        return answer


def cookie_name(port: int) -> str:
    """Browsers do not keep the cookies of two ports apart."""
    return f"moescope_{port}"


def new_token() -> str:
    """A token that nobody guesses."""
    return secrets.token_urlsafe(24)


def checked_token(token: str) -> str:
    """The token, refused where it could be guessed or does not survive an address."""
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise InputError(
            "that token is too easy to guess, or cannot be typed",
            expected=f"{SHORTEST_TOKEN} or more ASCII characters without a space",
            found=f"{len(token)} characters",
            fix="leave --token out, and one is made",
        )
    return token


def own_names() -> tuple[str, ...]:
    """The names that this machine has for itself."""
    return tuple(dict.fromkeys((socket.gethostname(), socket.getfqdn())))


def _path(request: Request) -> str:
    return "/" + request.path.lstrip("/")  # two slashes would begin the name of another host


def _same(given: str, wanted: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), wanted.encode())
