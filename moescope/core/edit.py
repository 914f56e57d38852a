"""`Edit`: one change at a site, as plain data; the registry of kinds of edits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from moescope.core.positions import Positions, read_positions
from moescope.core.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One change at a site while a model runs: plain data, without tensors.

    Attributes:
        layer: 0-based layers it acts in: a number, several, or None for all that have what it changes.
        positions: tokens it acts on, as `moescope.core.positions.read_positions` reads them.
        strength: 0 changes nothing, not even rounding; 1 is the edit as it stands.
    """

    kind: ClassVar[str] = ""

    layer: int | tuple[int, ...] | None = None
    positions: str = "all"
    strength: float = 1.0

    def __post_init__(self) -> None:
        read_positions(self.positions)
        if isinstance(self.layer, list):
            object.__setattr__(self, "layer", tuple(self.layer))

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The layers, None for all."""
        return (self.layer,) if isinstance(self.layer, int) else self.layer

    @property
    def where(self) -> Positions:
        """The positions, read."""
        return read_positions(self.positions)


edits: Registry[type[Edit]] = Registry("edit", "moescope.core.edit_kinds")

E = TypeVar("E", bound=type[Edit])


def edit(kind: str) -> Callable[[E], E]:
    """Register the decorated dataclass as a kind of edit, by the name it has in JSON and on the command line."""

    def register(cls: E) -> E:
        cls.kind = kind
        edits.add(kind, cls)
        return cls

    return register
