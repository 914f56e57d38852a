"""Which tokens an edit acts on, as a word."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from moescope.core.errors import InputError

_SPAN = re.compile(r"(\d*):(\d*)")
_TOKEN = re.compile(r"token:(\d+)")


@dataclass(frozen=True)
class Positions:
    """Tokens of a sequence.

    Attributes:
        which: `all`; `prompt`, those of the first pass; `generated`, those fed after it, with the model's cache; `span`, by
            place in the sequence; `token`, by token id.
        start, stop: of a span, 0-based in the sequence (padding does not count), `stop` excluded; None for its end.
        token_id: of `token`.

    Example:
        >>> str(read_positions("0:1")), read_positions("token:13").token_id
        ('0:1', 13)
    """

    which: Literal["all", "prompt", "generated", "span", "token"] = "all"
    start: int = 0
    stop: int | None = None
    token_id: int | None = None

    def overlaps(self, other: Positions) -> bool:
        """Whether some token could be at both.

        Example:
            >>> read_positions("0:4").overlaps(read_positions("4:")), read_positions("0:4").overlaps(read_positions("token:7"))
            (False, True)
        """
        if self.which == other.which == "span":
            ends = [p.stop if p.stop is not None else float("inf") for p in (self, other)]
            return self.start < ends[1] and other.start < ends[0]
        if self.which == other.which == "token":
            return self.token_id == other.token_id
        return {self.which, other.which} != {"prompt", "generated"}

    def __str__(self) -> str:
        if self.which == "span":
            return f"{self.start}:{'' if self.stop is None else self.stop}"
        return f"token:{self.token_id}" if self.which == "token" else self.which


def read_positions(text: str) -> Positions:
    """Read `all`, `prompt`, `generated`, `3:10` (also `3:` and `:10`) or `token:13`.

    Raises:
        InputError: none of these, or a span without tokens.
    """
    if text in ("all", "prompt", "generated"):
        return Positions(text)  # type: ignore[arg-type]  # one of the three
    if span := _SPAN.fullmatch(text):
        start, stop = int(span[1] or 0), int(span[2]) if span[2] else None
        if stop is None or start < stop:
            return Positions("span", start, stop)
    if token := _TOKEN.fullmatch(text):
        return Positions("token", token_id=int(token[1]))
    raise InputError(
        f"positions cannot be {text!r}",
        expected="all, prompt, generated, a span such as 0:1 (the end excluded), or token:13 (a token id)",
    )
