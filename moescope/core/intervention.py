"""`Intervention`: an ordered set of edits, plain data that saves to JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from moescope.core.atomic import written_whole
from moescope.core.edit import Edit, edits
from moescope.core.edit_values import field_types, packed, unpacked
from moescope.core.errors import InputError
from moescope.core.notebook_html import box, grid, heading

_FORMAT = 1
_SHOWN = 40  # edits in a notebook
_KEYS = ("format", "name", "anatomy", "edits")


class HasDigest(Protocol):
    """An anatomy, as far as it is needed here."""

    @property
    def digest(self) -> str:
        """What tells it from others."""


@dataclass(frozen=True, init=False, repr=False)
class Intervention:
    """An ordered set of edits; `a + b` does both.

    Args:
        edits: in the order in which they act.
        name: what to call it in tables and figures.
        anatomy: digest of the anatomy it was made for; None for any model.

    Raises:
        InputError: something that is not an edit.

    Example:
        >>> import moescope as ms
        >>> cut = ms.Intervention([ms.edits.Ablate(layer=3, experts=[5, 9])], name="cut")
        >>> both = cut + ms.Intervention([ms.edits.Ablate(layer=4, experts=0, how="route_around")])
        >>> len(both), both.edits[1].how, ms.Intervention.from_json(both.to_json()) == both
        (2, 'route_around', True)
    """

    edits: tuple[Edit, ...] = ()
    name: str | None = None
    anatomy: str | None = None

    def __init__(
        self, edits: Iterable[Edit] | Edit = (), *, name: str | None = None, anatomy: str | None = None
    ) -> None:
        given = (edits,) if isinstance(edits, Edit) else tuple(edits)
        if wrong := [item for item in given if not isinstance(item, Edit) or not item.kind]:
            raise InputError(
                "an intervention is made of edits", expected="edits of moescope.edits", found=f"{wrong[0]!r}"
            )
        object.__setattr__(self, "edits", given)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "anatomy", anatomy)

    def __len__(self) -> int:
        return len(self.edits)

    def __bool__(self) -> bool:
        return True  # the empty one is an intervention as well

    def __iter__(self) -> Iterator[Edit]:
        return iter(self.edits)

    def __add__(self, other: Intervention) -> Intervention:
        if not isinstance(other, Intervention):
            return NotImplemented
        if self.anatomy and other.anatomy and self.anatomy != other.anatomy:
            raise InputError(
                "interventions for two models cannot be joined", found=f"anatomies {self.anatomy} and {other.anatomy}"
            )
        names = [name for name in (self.name, other.name) if name]
        anatomy = self.anatomy or other.anatomy
        return Intervention((*self.edits, *other.edits), name=" + ".join(names) or None, anatomy=anatomy)

    def with_strength(self, strength: float) -> Intervention:
        """The same edits, every strength multiplied by a number; 0 for one that changes nothing."""
        return self._with(edits=tuple(replace(edit, strength=edit.strength * strength) for edit in self.edits))

    def named(self, name: str | None) -> Intervention:
        """The same under another name."""
        return self._with(name=name)

    def for_model(self, anatomy: HasDigest) -> Intervention:
        """The same, to be refused by models of another make than this anatomy's."""
        return self._with(anatomy=anatomy.digest)

    def to_data(self) -> dict[str, Any]:
        """As JSON holds it, fields that have their default left out."""
        listed = [
            {"kind": edit.kind, **{name: packed(value) for name, value in edit.as_data().items()}}
            for edit in self.edits
        ]
        return {"format": _FORMAT, "name": self.name, "anatomy": self.anatomy, "edits": listed}

    def to_json(self, *, indent: int | None = None) -> str:
        """As JSON text, which `from_json` reads back exactly; vectors of more than 16 numbers as base64 of float64."""
        return json.dumps(self.to_data(), indent=indent, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_data(cls, data: Any) -> Intervention:
        """Read what `to_data` gave.

        Raises:
            InputError: no intervention, a newer format, an unknown kind of edit or field, or a value that does not fit.
        """
        if not isinstance(data, dict) or not isinstance(data.get("edits"), list):
            raise InputError("this is no intervention", expected='JSON with "edits", a list', found=_told(data))
        version = data.get("format", _FORMAT)
        if not isinstance(version, int) or version > _FORMAT:
            raise InputError(
                f"this intervention has format {version!r}",
                expected=f"up to {_FORMAT}",
                fix="it was saved by a newer moescope: upgrade this one",
            )
        if unknown := sorted(set(data) - set(_KEYS)):
            raise InputError(f"an intervention has no field {unknown[0]!r}", expected=", ".join(_KEYS))
        for key in ("name", "anatomy"):
            if not isinstance(data.get(key), (str, type(None))):
                raise InputError(f"{key} of an intervention cannot be {data[key]!r}", expected="a text or null")
        return cls(map(edit_from_data, data["edits"]), name=data.get("name"), anatomy=data.get("anatomy"))

    @classmethod
    def from_json(cls, text: str) -> Intervention:
        """Read what `to_json` gave; raises `InputError` as `from_data` does, and for text that is no JSON."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as broken:  # a number of thousands of digits is no JSONDecodeError
            raise InputError("this is no intervention", expected="JSON", found=str(broken)) from broken
        try:
            return cls.from_data(data)
        except RecursionError as deep:
            raise InputError("this is no intervention", found="lists that lie in each other too deep") from deep

    def save(self, path: str | Path) -> None:
        """Write it to a file, whole or not at all."""
        with written_whole(Path(path)) as partial:
            partial.write_text(self.to_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Intervention:
        """Read a saved intervention.

        Raises:
            InputError: no such file, or one that is no intervention; the file is named.
        """
        try:
            if os.path.exists(path) and not Path(path).is_file():
                raise InputError(
                    "this is no file", expected="a saved intervention", found="a folder, a pipe or a device"
                )
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as unread:
            raise InputError(f"cannot read {path}", expected="a saved intervention", found=str(unread)) from unread
        except InputError as wrong:
            raise InputError(
                f"{path}: {wrong.problem}", expected=wrong.expected, found=wrong.found, fix=wrong.fix
            ) from wrong

    def __repr__(self) -> str:
        listed = ", ".join(map(repr, self.edits[:4])) + (f", … {len(self) - 4} more" if len(self) > 4 else "")
        name = f", name={self.name!r}" if self.name else ""
        return f"Intervention([{listed}]{name})"

    def _repr_html_(self) -> str:
        rows = [(i, type(edit).__name__, edit.told()) for i, edit in enumerate(self.edits[:_SHOWN])]
        title = f"Intervention {self.name}" if self.name else "Intervention"
        told = [f"{len(self)} edit{'s' * (len(self) != 1)}" if self.edits else "no edit"]
        told += [f"for the anatomy {self.anatomy}"] if self.anatomy else []
        more = f"<p>{len(self) - _SHOWN:,} more edits: <code>.edits</code></p>" if len(self) > _SHOWN else ""
        table = grid(rows, ("", "edit", "fields"), numbers=("",)) if rows else ""
        return box(heading(title, ", ".join(told)), table, more)

    def _with(self, **changes: Any) -> Intervention:
        kept = {"edits": self.edits, "name": self.name, "anatomy": self.anatomy} | changes
        return Intervention(kept["edits"], name=kept["name"], anatomy=kept["anatomy"])


def edit_from_data(data: Any) -> Edit:
    """One edit of its JSON.

    Raises:
        InputError: an unknown kind or field, or a value that does not fit.
    """
    if not isinstance(data, dict) or not isinstance(data.get("kind"), str):
        raise InputError("this is no edit", expected='JSON with "kind"', found=_told(data))
    kind = edits[data["kind"]]
    known = field_types(kind)
    if unknown := sorted(set(data) - {"kind", *known}):
        raise InputError(f"an edit {kind.kind!r} has no field {unknown[0]!r}", expected=", ".join(sorted(known)))
    return kind(**{name: unpacked(value, f"{kind.kind}: {name}") for name, value in data.items() if name != "kind"})


def _told(data: Any) -> str:
    text = json.dumps(data, default=str)
    return text if len(text) <= 80 else text[:77] + "…"
