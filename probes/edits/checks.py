"""What a model can take: an intervention is held against its anatomy before anything is hooked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moescope.core.edit import Edit
from moescope.core.edit_kinds.experts import OfExperts, RankRouting, SwapExperts, TopK
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.probes.anatomy import Sublayer
from moescope.probes.edits.attach_decisions import EDITABLE, WHY_NOT_EDITABLE
from moescope.probes.edits.compile import Spot, spots_of
from moescope.probes.edits.conflicts import check_conflicts
from moescope.probes.edits.places import place_of
from moescope.probes.edits.step import DecisionStep, Step, WeightStep, step_for
from moescope.probes.foreign.taps import foreign_taps
from moescope.probes.live_model import LiveModel


def check_intervention(
    model: LiveModel, intervention: Intervention, *, sources: Mapping[str, Any] | None = None
) -> None:
    """Hold an intervention against a model.

    Args:
        model: the model it is for.
        intervention: what is to be done.
        sources: the runs that its edits replay, by name.

    Raises:
        InputError: made for another model; an expert, layer, head or channel that is not there; a vector of the wrong width;
            all experts of a layer taken out; a strength the edit does not have; edits that contradict each other, both
            named; an edit that this family cannot take, with the reason.

    Example:
        >>> import moescope as ms
        >>> from moescope.edits import Ablate
        >>> check_intervention(ms.load("demo"), Intervention([Ablate(layer=3, experts=[5, 9])]))
        >>> check_intervention(ms.load("demo"), Intervention([Ablate(layer=3, experts=[99])]))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        moescope.core.errors.InputError: layer 3 has no expert 99. ...
    """
    digest = model.anatomy.digest
    if intervention.anatomy is not None and intervention.anatomy != digest:
        raise InputError(
            "this intervention was made for another model",
            expected=f"anatomy {digest} ({model.name})",
            found=f"anatomy {intervention.anatomy}",
            fix="load the model it was made for; or, to use it all the same, Intervention(its.edits)",
        )
    known = dict(sources or {})
    for edit in intervention.edits:
        check_edit(model, edit, known)
    check_conflicts(intervention, model.anatomy)


def check_edit(model: LiveModel, edit: Edit, sources: dict[str, Any] | None = None) -> None:
    """Hold one edit against a model; see `check_intervention`."""
    kind = step_for(edit)
    if reason := why_not_model(model):
        raise InputError(f"{model.name} cannot be edited", found=reason)
    _check_layers(model, edit)
    spots = spots_of(edit, model.anatomy)
    _check_there(model, edit, [spot for spot, _ in spots])
    if issubclass(kind, DecisionStep) and not kind.graded and edit.strength not in (0, 1):
        raise InputError(
            f"{edit!r} is done or not done",
            expected="strength 0 or 1",
            found=f"{edit.strength:g}",
            fix="Bias, Scale, MixRouting and Ablate(how='zero') go part of the way",
        )
    for spot, s in spots:
        if reason := _why_not_router(kind, s):
            raise InputError(f"layer {spot.layer} cannot take {edit!r}", found=reason)
        if s is not None and spot.where in ("decision", "weights"):
            _check_numbers(edit, s)
        place = place_of(model, spot, s, [edit], {} if sources is None else sources)
        if reason := kind.why_not(edit, place):
            raise InputError(f"layer {spot.layer} cannot take {edit!r}", found=reason)


def why_not_model(model: LiveModel) -> str | None:
    """Why nothing in a model can be edited; None where something can."""
    from moescope.probes.forward import is_encoder_decoder

    if is_encoder_decoder(model.module):
        return "an encoder-decoder model: its two stacks see different tokens"
    foreign = foreign_taps(model.module, model.anatomy)
    if foreign is not None and foreign.whole:
        return "a model that another library computes by itself, through hook points that only read"
    return None


def _why_not_router(kind: type[Step[Any]], s: Sublayer | None) -> str | None:
    if s is None or s.kind != "moe" or not issubclass(kind, DecisionStep) or s.reader in EDITABLE:
        return None
    return WHY_NOT_EDITABLE.get(s.reader, "how its decision could be changed is not known")


def _check_layers(model: LiveModel, edit: Edit) -> None:
    n = model.anatomy.n_layers
    if wrong := [layer for layer in edit.layers or () if not 0 <= layer < n]:
        raise InputError(f"there is no layer {wrong[0]}", expected=f"0 to {n - 1}", found=f"{edit!r}")


def _check_there(model: LiveModel, edit: Edit, spots: list[Spot]) -> None:
    kind, anatomy = step_for(edit), model.anatomy
    there = {spot.layer for spot in spots}
    missing = [layer for layer in edit.layers or () if layer not in there]
    if there and not missing:
        return
    block = getattr(edit, "block", "")
    if issubclass(kind, (DecisionStep, WeightStep)):
        routers = [s.layer for s in anatomy.moe if s.block == block]
        what, those = f"no router {block!r}", f"routers in layers {routers}" if routers else "no router of that name"
    else:
        those = f"attention {block!r} in layers {[s.layer for s in anatomy.sublayers if s.block == block]}"
        what = f"no attention {block!r}"
    if not anatomy.moe and issubclass(kind, (DecisionStep, WeightStep)):
        those = "a dense model, without routers or experts"
    where = f"layer {missing[0]} has {what}" if missing else f"{model.name} has {what}"
    raise InputError(where, expected=f"a place that {edit.kind!r} can act at", found=those)


def _check_numbers(edit: Edit, s: Sublayer) -> None:
    n = s.n_experts or 0
    named: tuple[int, ...] = ()
    if isinstance(edit, OfExperts):
        named = edit.ids
    elif isinstance(edit, SwapExperts):
        named = (edit.first, edit.second)
    if wrong := [expert for expert in named if not 0 <= expert < s.n_choices]:
        nulls = f", and null experts to {s.n_choices - 1}" if s.n_null else ""
        raise InputError(
            f"layer {s.layer} has no expert {wrong[0]}", expected=f"experts 0 to {n - 1}{nulls}", found=f"{edit!r}"
        )
    if isinstance(edit, TopK) and not 1 <= edit.k <= s.n_choices:
        raise InputError(f"a token of layer {s.layer} cannot take {edit.k} experts", expected=f"1 to {s.n_choices}")
    if isinstance(edit, RankRouting):
        ranks = (edit.ranks,) if isinstance(edit.ranks, int) else edit.ranks
        if max(ranks) > s.n_choices:
            raise InputError(f"layer {s.layer} has no expert of rank {max(ranks)}", expected=f"1 to {s.n_choices}")
