"""`Edit`: one change at a site, as plain data; the registry of kinds of edits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

from moescope.core.edit_values import field_types, fitted
from moescope.core.errors import InputError
from moescope.core.notebook_html import box, facts, heading
from moescope.core.positions import Positions, read_positions
from moescope.core.registry import Registry

_UNSAID = ("positions", "strength", "block")  # left out where they have their default


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One change at a site while a model runs: plain data, without tensors.

    Attributes:
        layer: 0-based layers it acts in: a number, several, or None for all that have what it changes.
        positions: tokens it acts on, as `moescope.core.positions.read_positions` reads them.
        strength: 0 changes nothing, not even rounding; 1 is the edit as it stands.
    """

    kind: ClassVar[str] = ""

    layer: int | Sequence[int] | None = None
    positions: str = "all"
    strength: float = 1.0

    def __post_init__(self) -> None:
        for field, hint in field_types(type(self)).items():
            object.__setattr__(self, field, fitted(getattr(self, field), hint, f"{self.kind or 'edit'}: {field}"))
        read_positions(self.positions)
        if any(layer < 0 for layer in self.layers or ()) or self.layers == ():
            raise InputError(f"{self.kind}: layer cannot be {self.layer!r}", expected="0-based layers, or None for all")

    @property
    def layers(self) -> tuple[int, ...] | None:
        """The layers, None for all."""
        return (self.layer,) if isinstance(self.layer, int) else None if self.layer is None else tuple(self.layer)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.told()})"

    def _repr_html_(self) -> str:
        meaning = (inspect.getdoc(type(self)) or "").split("\n", 1)[0]
        return box(heading(type(self).__name__, meaning), facts(self._shown()))

    def told(self) -> str:
        """Its fields in one line, those that have their default mostly left out."""
        return ", ".join(f"{name}={value}" for name, value in self._shown().items())

    def _shown(self) -> dict[str, str]:
        shown = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _UNSAID}
        shown = {name: value for name, value in shown.items() if value is not None or name == "layer"} | self.as_data()
        return {name: _short(value) for name, value in shown.items()}

    def as_data(self) -> dict[str, Any]:
        """Its fields by name, those that have their default left out."""
        return {
            f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default or f.name == "layer"
        }

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
        cls.__repr__ = Edit.__repr__  # type: ignore[method-assign]  # dataclasses write one of their own, all defaults in it
        edits.add(kind, cls)
        return cls

    return register


def _short(value: Any) -> str:
    if isinstance(value, tuple) and len(value) > 8:
        kind = f"{len(value)} vectors" if isinstance(value[0], tuple) else f"{len(value):,} numbers"
        return f"[{kind}]"
    return repr(list(value)) if isinstance(value, tuple) else repr(value)
