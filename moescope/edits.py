"""Edits: every kind of change that can be made while a model runs, as plain data.

    >>> import moescope as ms
    >>> cut = ms.Intervention([ms.edits.Ablate(layer=3, experts=[5, 9], how="route_around")], name="without 5 and 9")
    >>> ms.Intervention.from_json(cut.to_json()) == cut
    True

Each edit has `layer` (a number, several, or None for every layer that has what it changes), `positions` (`all`, `prompt`,
`generated`, a span such as `0:1`, a token id such as `token:13`) and `strength` (0 changes nothing).
"""

from __future__ import annotations

from moescope.core.edit import Edit
from moescope.core.edit_kinds.experts import (
    Ablate,
    Bias,
    FakeQuant,
    Force,
    Keep,
    MixRouting,
    RandomRouting,
    RankRouting,
    Scale,
    SetRouting,
    SwapExperts,
    TopK,
    TopP,
)
from moescope.core.edit_kinds.features import Descend, Latents, Splice
from moescope.core.edit_kinds.stream import Add, Clamp, MaskHead, Patch, ProjectOut, SetChannel, Skip
from moescope.core.intervention import Intervention

__all__ = [
    "Ablate",
    "Add",
    "Bias",
    "Clamp",
    "Descend",
    "Edit",
    "FakeQuant",
    "Force",
    "Intervention",
    "Keep",
    "Latents",
    "MaskHead",
    "MixRouting",
    "Patch",
    "ProjectOut",
    "RandomRouting",
    "RankRouting",
    "Scale",
    "SetChannel",
    "SetRouting",
    "Skip",
    "Splice",
    "SwapExperts",
    "TopK",
    "TopP",
]


def __dir__() -> list[str]:
    return __all__
