"""The part of an edit's effect that is left when every router decides as it did without the edit."""

from __future__ import annotations

from moescope.core.edit import Edit
from moescope.core.edit_kinds.experts import ExpertEdit, SetRouting
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.probes.edits.compile import spots_of
from moescope.probes.live_model import LiveModel

# These act on what was chosen, so that a replayed choice can come before them; other edits of a router make the choice.
_AFTER_CHOICE = ("scale", "fake_quant", "swap_experts")
_AFTER_CHOICE_HOW = ("zero", "renormalise", "mean", "copy")


def routing_frozen(intervention: Intervention, model: LiveModel, base_run: str) -> Intervention:
    """The same edits while routers replay the decisions, weights included, that they took in the base run.

    A router whose choice is itself edited (route_around, Force, Bias, Keep, TopK, …) decides by the edit; all others replay.

    Args:
        intervention: what is measured.
        model: it is for.
        base_run: name of the base run, with the records of probe `routing`.

    Raises:
        InputError: a dense model, where nothing can be re-routed.
    """
    if not model.anatomy.moe:
        raise InputError(
            f"{model.name} has no routers: its effects cannot be split into content and re-routing",
            fix="measure the whole effect (leave decompose out)",
        )
    deciding = {
        (spot.layer, spot.block)
        for edit in intervention.edits
        if _decides(edit)
        for spot, _ in spots_of(edit, model.anatomy)
    }
    frozen = [
        SetRouting(layer=s.layer, block=s.block, run=base_run)
        for s in model.anatomy.moe
        if (s.layer, s.block) not in deciding
    ]
    return Intervention([*frozen, *intervention.edits], name=f"{intervention.name or 'edit'} (routing of the baseline)")


def _decides(edit: Edit) -> bool:
    """Whether an edit makes a router's choice, and not only something of what was chosen."""
    if not isinstance(edit, ExpertEdit):
        return False
    return edit.kind not in _AFTER_CHOICE and getattr(edit, "how", None) not in _AFTER_CHOICE_HOW
