"""Taking super experts out, and random sets of other experts for comparison."""

from __future__ import annotations

from collections.abc import Iterable

from moescope.core.edit_kinds.experts import Ablate
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention

Expert = tuple[int, str, int]  # layer, block, expert


def pruned(experts: Iterable[Expert], *, name: str = "super experts pruned") -> Intervention:
    """Experts with their down projections at zero: each keeps its slot and adds nothing.

    That is what the authors' code of arXiv 2507.23279 does to the weights; the router is left as it is.

    Args:
        experts: layer, block and id of each routed expert.
        name: of the intervention.

    Raises:
        InputError: none, or a shared expert, whose output is not among the slots.

    Example:
        >>> [(edit.layer, edit.ids) for edit in pruned([(1, "mlp", 68), (2, "mlp", 92), (1, "mlp", 3)]).edits]
        [(1, (3, 68)), (2, (92,))]
    """
    by_router: dict[tuple[int, str], list[int]] = {}
    for layer, block, expert in sorted(set(experts)):
        if expert < 0:
            raise InputError(
                "a shared expert cannot be pruned as a slot", found=f"shared expert {-expert} of layer {layer}"
            )
        by_router.setdefault((layer, block), []).append(expert)
    if not by_router:
        raise InputError("there is no expert to prune")
    edits = [
        Ablate(layer=layer, block=block, experts=tuple(ids), how="zero") for (layer, block), ids in by_router.items()
    ]
    return Intervention(edits, name=name)
