"""`Intervention`: an ordered set of edits, plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moescope.core.edit import Edit


@dataclass(frozen=True)
class Intervention:
    """An ordered set of edits.

    Attributes:
        edits: in the order in which they act.
        name: what to call it in tables and figures.
        anatomy: digest of the anatomy it was made for; None for any model.
    """

    edits: tuple[Edit, ...] = ()
    name: str | None = None
    anatomy: str | None = None

    def __init__(self, edits: Iterable[Edit] = (), *, name: str | None = None, anatomy: str | None = None) -> None:
        object.__setattr__(self, "edits", tuple(edits))
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "anatomy", anatomy)
