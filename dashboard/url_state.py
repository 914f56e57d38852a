"""The state of a view and its spelling in the URL: a shared link reproduces what was seen."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args
from urllib.parse import parse_qsl, quote_plus

from moescope.core.errors import InputError

Mode = Literal["pins", "weight", "margin", "entropy", "nll", "norm", "feature", "changed"]
MODES: tuple[Mode, ...] = get_args(Mode)
MAX_PINS = 8
MAX_EDITS = 64
MAX_REST = 24
MAX_TEXT = 8000
SELECTION = ("run", "layer", "expert", "head", "token", "sae", "feature", "edits")

_WHOLE = re.compile(r"\d{1,15}", re.ASCII)
_SIGNED = re.compile(r"-?\d{1,9}", re.ASCII)
_OWN = re.compile(r"[a-z][a-z0-9_]{0,31}", re.ASCII)
_PLAIN = ".=,;:/"  # as they are: safe behind the first equals sign, and easier to read
_PLACE = re.compile(r"(?P<layer>\d{1,5})(?:\.(?P<block>[a-z]+(?:\.\d+)?))?", re.ASCII)


@dataclass(frozen=True)
class Layer:
    """A layer, and the sublayer whose router is meant: `3`, or `3.attn`; block None means the layer's first router."""

    number: int
    block: str | None = None

    def __str__(self) -> str:
        return f"{self.number}.{self.block}" if self.block else str(self.number)


@dataclass(frozen=True)
class ViewState:
    """What a page shows. Every field is one parameter of the URL and None, or empty, is its default.

    Attributes:
        run: name of the run; None for the newest complete one, else the newest.
        layer: layer, with the router's sublayer where it is not the first.
        expert: expert in focus.
        label: only texts with this label.
        sequence: only this sequence.
        piece: only tokens with this id count as hits.
        token: run-wide number of the token whose card is open.
        mode: what colours the tokens; None for the page's own choice.
        pins: experts that carry a colour; empty for the page's own choice.
        q: text searched for in the view.
        page: 1-based page of a long run.
        head: attention head in focus, of `layer`.
        sae: name of the autoencoder in focus.
        feature: its latent in focus.
        edits: the intervention being made, one edit in one line each, as `moescope.core.edit_text` reads them.
        other: name of the run that is compared with `run`.
        rest: what only one page reads (a tab, a measure, a parameter of an analysis), by name, in alphabetical order.

    Example:
        >>> encode(ViewState(run="base", layer=Layer(3), expert=7))
        '?run=base&layer=3&expert=7'
        >>> decode("?layer=3&expert=7").expert
        7
    """

    run: str | None = None
    layer: Layer | None = None
    expert: int | None = None
    label: str | None = None
    sequence: int | None = None
    piece: int | None = None
    token: int | None = None
    mode: Mode | None = None
    pins: tuple[int, ...] = ()
    q: str = ""
    page: int = 1
    head: int | None = None
    sae: str | None = None
    feature: int | None = None
    edits: tuple[str, ...] = ()
    other: str | None = None
    rest: tuple[tuple[str, str], ...] = ()

    def given(self, name: str, default: str = "") -> str:
        """A parameter that only one page reads, as text; `default` where the address has none."""
        return dict(self.rest).get(name, default)

    def whole(self, name: str, default: int) -> int:
        """A whole number from 0 that only one page reads. Raises `InputError` for anything else."""
        return _whole(name, text) if (text := self.given(name)) else default

    def with_rest(self, **given: str | int | float | None) -> ViewState:
        """The same view with some of its page's own parameters changed; None or empty text removes one."""
        merged = dict(self.rest) | {name: "" if value is None else str(value) for name, value in given.items()}
        return replace(self, rest=tuple(sorted((name, value) for name, value in merged.items() if value != "")))

    def selection(self) -> ViewState:
        """What all pages share: run, layer, expert, head, token, autoencoder, feature and the intervention being made."""
        return ViewState(**{name: getattr(self, name) for name in SELECTION})

    def but(self, **changes: Any) -> ViewState:
        """The same view with some fields changed."""
        return replace(self, **changes)


def encode(state: ViewState) -> str:
    """The query string of a state, `?` included; fields at their default are left out, so the plain view is ""."""
    values = {field.name: getattr(state, field.name) for field in fields(ViewState) if field.name != "rest"}
    defaults = {field.name: field.default for field in fields(ViewState)}
    written = [(name, _written(name, value)) for name, value in values.items() if value != defaults[name]]
    parts = [f"{name}={quote_plus(text, safe=_PLAIN)}" for name, text in (*written, *state.rest)]
    return "?" + "&".join(parts) if parts else ""


def decode(search: str | None) -> ViewState:
    """Read a query string. What no field reads is kept for the page (`rest`), where it has the form of a parameter.

    Raises:
        InputError: a parameter has a value that it cannot have.
    """
    given = dict(parse_qsl((search or "").removeprefix("?"), keep_blank_values=True, errors="replace"))
    known = {name: _READERS[name](name, text) for name, text in given.items() if name in _READERS and text != ""}
    rest = [(n, t) for n, t in given.items() if n not in _READERS and _OWN.fullmatch(n) and 0 < len(t) <= MAX_TEXT]
    return ViewState(**known, rest=tuple(sorted(rest)[:MAX_REST]))


def link(path: str, state: ViewState) -> str:
    """A link to a page in a state."""
    return path + encode(state)


def _written(name: str, value: object) -> str:
    return (";" if name == "edits" else ".").join(map(str, value)) if isinstance(value, tuple) else str(value)


def _refusal(name: str, text: str, expected: str) -> InputError:
    return InputError(
        f"the address has {name}={text[:80]!r}, which {name} cannot be",
        expected=expected,
        fix="correct the address, or start from a page in the navigation",
    )


def _whole(name: str, text: str) -> int:
    if not _WHOLE.fullmatch(text):
        raise _refusal(name, text, "a whole number from 0")
    return int(text)


def _signed(name: str, text: str) -> int:
    if not _SIGNED.fullmatch(text):
        raise _refusal(name, text, "the number of an expert, for instance 7")
    return int(text)


def _page(name: str, text: str) -> int:
    if (page := _whole(name, text)) == 0:
        raise _refusal(name, text, "a whole number from 1")
    return page


def _layer(name: str, text: str) -> Layer:
    match = _PLACE.fullmatch(text)
    if match is None:
        raise _refusal(name, text, "a layer, for instance 3, or 3.attn for the router in its attention")
    return Layer(int(match["layer"]), match["block"])


def _mode(name: str, text: str) -> Mode:
    for mode in MODES:
        if text == mode:
            return mode
    raise _refusal(name, text, f"one of {', '.join(MODES)}")


def _pins(name: str, text: str) -> tuple[int, ...]:
    pins = tuple(dict.fromkeys(_signed(name, part) for part in text.split(".")))
    if len(pins) > MAX_PINS:
        raise _refusal(name, text, f"at most {MAX_PINS} experts, for instance 1.4.7")
    return pins


def _edits(name: str, text: str) -> tuple[str, ...]:
    edits = tuple(edit.strip() for edit in text.split(";") if edit.strip())
    if len(edits) > MAX_EDITS:
        raise _refusal(name, text, f"at most {MAX_EDITS} edits")
    return edits


def _text(_name: str, text: str) -> str:
    return text


_READERS: dict[str, Callable[[str, str], Any]] = {
    "run": _text,
    "layer": _layer,
    "expert": _signed,
    "label": _text,
    "sequence": _whole,
    "piece": _whole,
    "token": _whole,
    "mode": _mode,
    "pins": _pins,
    "q": _text,
    "page": _page,
    "head": _whole,
    "sae": _text,
    "feature": _whole,
    "edits": _edits,
    "other": _text,
}
