"""What a sweep runs: interventions, each with its controls, and where in the model a pass with it may begin."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from moescope.core.edit import Edit
from moescope.core.edit_kinds.experts import Ablate, ExpertEdit
from moescope.core.intervention import Intervention
from moescope.probes.edits.step import WeightStep, step_for

# An expert of a router: layer, block, id.
Expert = tuple[int, str, int]


@dataclass(frozen=True)
class Variant:
    """One intervention of a sweep.

    Attributes:
        intervention: what is run.
        kind: the effect that is asked for, or a control of it.
        draw: number of the control; None for the target.
        effect: which effect of the sweep it belongs to, 0-based: a target and its controls are one.
    """

    intervention: Intervention
    kind: Literal["target", "control"] = "target"
    draw: int | None = None
    effect: int = 0

    @property
    def layer(self) -> int:
        """The first block it changes; 0 where an edit names no layer."""
        found = [edit.layers for edit in self.intervention.edits]
        return min((min(layers) if layers else 0 for layers in found), default=0)

    @property
    def behind_attention(self) -> bool:
        """Whether the attention of that block runs as it would without it."""
        first = [edit for edit in self.intervention.edits if _reaches(edit, self.layer)]
        return all(isinstance(edit, ExpertEdit) and edit.block.startswith("mlp") for edit in first)

    @property
    def only(self) -> Expert | None:
        """The one expert whose tokens alone it changes, None where it may change others."""
        edits = self.intervention.edits
        if len(edits) != 1 or not isinstance(edits[0], Ablate) or edits[0].layers is None:
            return None
        edit = edits[0]
        if len(edit.ids) != 1 or len(edit.layers or ()) != 1 or edit.how == "route_around":
            return None  # without one of its experts a group of experts may lose to another, also where that was not chosen
        return (self.layer, edit.block, edit.ids[0])

    @property
    def changes_weights(self) -> bool:
        """Whether it changes parameters, so that no other intervention can share its passes."""
        return any(issubclass(step_for(edit), WeightStep) for edit in self.intervention.edits)


def _reaches(edit: Edit, layer: int) -> bool:
    return edit.layers is None or layer in edit.layers


@dataclass(frozen=True)
class Group:
    """Variants that run together, and whose effects are written together.

    Attributes:
        variants: whole effects, in the order of the sweep.
        layer, behind_attention: where their passes begin.
    """

    variants: tuple[Variant, ...]
    layer: int
    behind_attention: bool

    @property
    def effects(self) -> list[tuple[Variant, ...]]:
        """Target and controls of each effect."""
        return [tuple(found) for _, found in groupby(self.variants, key=lambda v: v.effect)]


def grouped(variants: Sequence[Variant], *, limit: int = 512) -> Iterator[Group]:
    """Cut a sweep into groups: effects that follow each other and whose passes begin at the same place.

    Args:
        variants: by effect.
        limit: variants a group, unless one effect has more.

    Example:
        >>> cut = [Variant(Intervention([Ablate(layer=n // 2, experts=0)]), effect=n) for n in range(4)]
        >>> [(group.layer, len(group.variants)) for group in grouped(cut)]
        [(0, 2), (1, 2)]
    """
    held: list[Variant] = []
    place = (0, False, False)
    for _, found in groupby(variants, key=lambda v: v.effect):
        effect = list(found)
        here = (
            min(v.layer for v in effect),
            all(v.behind_attention for v in effect),
            any(v.changes_weights for v in effect),
        )
        if held and (here != place or len(held) + len(effect) > limit):
            yield Group(tuple(held), place[0], place[1])
            held = []
        place = here
        held += effect
    if held:
        yield Group(tuple(held), place[0], place[1])
