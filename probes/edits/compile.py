"""From interventions to programs: for each place of the model, the steps that run there, in order, shared by all interventions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from moescope.core.edit import Edit
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.probes.anatomy import Anatomy, Sublayer
from moescope.probes.edits.step import DecisionStep, HeadStep, Place, Step, StreamStep, WeightStep, step_for

Where = Literal["decision", "stream", "heads", "weights"]
Key = tuple[type[Step[Any]], Any]  # edits of one key can share a step


@dataclass(frozen=True)
class Spot:
    """One place of a model where steps run.

    Attributes:
        where: a router's decision, the stream of a block, the heads of an attention, or the weights of experts.
        layer: of the block.
        block: of the sublayer, as in sites; "" for the stream.
    """

    where: Where
    layer: int
    block: str = ""


@dataclass
class Column:
    """One step of a program.

    Attributes:
        key: what its edits share.
        edits: one item an intervention: an edit, a tuple of edits that act as one, or None.
        step: made of them.
    """

    key: Key
    edits: list[Any]
    step: Step[Any] | None = None


@dataclass
class Program:
    """Everything a session runs: the columns of each spot, in order."""

    spots: dict[Spot, list[Column]] = field(default_factory=dict)

    def steps(self, spot: Spot) -> list[Step[Any]]:
        """The steps of a spot, in order."""
        return [column.step for column in self.spots.get(spot, ()) if column.step is not None]


def spots_of(edit: Edit, anatomy: Anatomy) -> list[tuple[Spot, Sublayer | None]]:
    """Where an edit acts: its layers, or all that have what it changes."""
    kind = step_for(edit)
    if issubclass(kind, StreamStep):
        layers = range(anatomy.n_layers) if edit.layers is None else edit.layers
        return [(Spot("stream", layer), None) for layer in layers]
    where, routed = _sublayers(kind)
    block = getattr(edit, "block", "mlp" if routed else "attn")
    fitting = [s for s in anatomy.sublayers if s.block == block and (s.kind == "moe") == routed and s.kind != "dense"]
    chosen = [s for s in fitting if edit.layers is None or s.layer in edit.layers]
    return [(Spot(where, s.layer, s.block), s) for s in dict.fromkeys(chosen)]


def compiled(interventions: Sequence[Intervention], anatomy: Anatomy) -> Program:
    """Align interventions spot by spot, so that edits of one class and form share a step; steps are not made yet."""
    program = Program()
    for number, intervention in enumerate(interventions):
        for spot, items in _items(intervention, anatomy).items():
            columns = program.spots.setdefault(spot, [])
            at = 0
            for key, item in items:
                found = next((i for i in range(at, len(columns)) if columns[i].key == key), None)
                if found is None:
                    found = at
                    columns.insert(at, Column(key, [None] * len(interventions)))
                columns[found].edits[number] = item
                at = found + 1
    for columns in program.spots.values():
        if all(issubclass(column.key[0], DecisionStep) for column in columns):
            columns.sort(key=lambda column: column.key[0].phase)  # type: ignore[attr-defined]  # all are decision steps
    return program


def refit(program: Program, interventions: Sequence[Intervention], anatomy: Anatomy, number: int) -> None:
    """Put other interventions into the columns there are; steps are not written yet.

    Raises:
        InputError: an edit for which there is no column, or more interventions than before.
    """
    if len(interventions) > number:
        raise InputError(
            "this session cannot take more interventions than it began with",
            expected=f"at most {number}",
            found=f"{len(interventions)}",
            fix="open it with as many (empty ones count)",
        )
    fitted: dict[Spot, list[list[Any]]] = {spot: [[None] * number for _ in c] for spot, c in program.spots.items()}
    for row, intervention in enumerate(interventions):
        for spot, items in _items(intervention, anatomy).items():
            columns, at = program.spots.get(spot, []), 0
            for key, item in items:
                found = next((i for i in range(at, len(columns)) if columns[i].key == key), None)
                if found is None:
                    raise InputError(
                        "an update may change numbers only",
                        found=f"{_first(item)!r} in layer {spot.layer}, of a kind and place this session did not begin with",
                        fix="open a new session for other kinds or places",
                    )
                fitted[spot][found][row] = item
                at = found + 1
    for spot, rows in fitted.items():
        for column, edits in zip(program.spots[spot], rows, strict=True):
            # A column nobody uses keeps its edits at strength 0: a step knows its sizes by them.
            unused = all(item is None for item in edits)
            column.edits = [_at_rest(item) for item in column.edits] if unused else edits


def make_steps(program: Program, place_of: Callable[[Spot, Column], Place]) -> None:
    """Make the step of every column."""
    for spot, columns in program.spots.items():
        for column in columns:
            column.step = column.key[0](column.edits, place_of(spot, column))


def _items(intervention: Intervention, anatomy: Anatomy) -> dict[Spot, list[tuple[Key, Any]]]:
    """What one intervention does at each spot, in order; neighbours that can act as one are a tuple."""
    found: dict[Spot, list[tuple[Key, Any]]] = {}
    for edit in intervention.edits:
        kind = step_for(edit)
        key = kind, kind.form(edit)
        for spot, _ in spots_of(edit, anatomy):
            items = found.setdefault(spot, [])
            if not kind.united:
                items.append((key, edit))
            elif items and items[-1][0] == key and items[-1][1][0].positions == edit.positions:
                items[-1] = key, (*items[-1][1], edit)
            else:
                items.append((key, (edit,)))
    for items in found.values():
        if all(issubclass(key[0], DecisionStep) for key, _ in items):
            items.sort(key=lambda item: item[0][0].phase)  # type: ignore[attr-defined]  # all are decision steps
    return found


def _sublayers(kind: type[Step[Any]]) -> tuple[Where, bool]:
    """The sort of spot, and whether it belongs to a router."""
    if issubclass(kind, HeadStep):
        return "heads", False
    if issubclass(kind, WeightStep):
        return "weights", True
    return "decision", True


def _at_rest(item: Any) -> Any:
    if item is None:
        return None
    return tuple(map(_at_rest, item)) if isinstance(item, tuple) else replace(item, strength=0.0)


def _first(item: Any) -> Edit:
    edit: Edit = item[0] if isinstance(item, tuple) else item
    return edit
