"""How many slots a token has under an intervention, where that is not what the model's anatomy says."""

from __future__ import annotations

from moescope.core.edit_kinds.experts import RankRouting, TopK
from moescope.core.intervention import Intervention
from moescope.probes.anatomy import Anatomy


def slots_under(intervention: Intervention, anatomy: Anatomy) -> dict[tuple[int, str], int]:
    """(layer, block) → slots a token has there, for the routers whose number an intervention changes.

    Everywhere alike, and at all positions, there are as many as the edit asks for. At some positions only, every token has as
    many slots as the largest number asks for: those it does not use have weight 0.

    Example:
        >>> import moescope as ms
        >>> from moescope.edits import TopK
        >>> anatomy = ms.load("demo").anatomy
        >>> slots_under(Intervention([TopK(layer=0, k=1), TopK(layer=1, k=1, positions="0:1"), TopK(layer=2, k=4)]), anatomy)
        {(0, 'mlp'): 1, (2, 'mlp'): 4}
    """
    found: dict[tuple[int, str], int] = {}
    for s in anatomy.moe:
        own = s.top_k or 1
        here = [
            edit
            for edit in intervention.edits
            if isinstance(edit, (TopK, RankRouting))
            and edit.strength != 0
            and edit.block == s.block
            and (edit.layers is None or s.layer in edit.layers)
        ]
        if not here:
            continue
        numbers = [_number(edit) for edit in here]
        number = numbers[0] if len(here) == 1 and here[0].positions == "all" else max(own, *numbers)
        if number != own:
            found[s.layer, s.block] = number
    return found


def _number(edit: TopK | RankRouting) -> int:
    if isinstance(edit, TopK):
        return edit.k
    return 1 if isinstance(edit.ranks, int) else len(edit.ranks)
