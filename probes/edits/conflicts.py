"""Edits that contradict each other at one router, and what would leave a token without experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations, product

from moescope.core.edit import Edit
from moescope.core.edit_kinds.experts import (
    Ablate,
    Bias,
    ExpertEdit,
    Force,
    Keep,
    MixRouting,
    OfExperts,
    RandomRouting,
    RankRouting,
    SetRouting,
    TopK,
    as_tuple,
)
from moescope.core.edit_kinds.stream import MaskHead, Patch, Skip, StreamEdit
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.core.sites import ATTN_OUT, MLP_OUT
from moescope.probes.anatomy import Anatomy, Sublayer

_CHOOSING = (Bias, Force, Keep, MixRouting, TopK, RankRouting)
_REPLACING = (SetRouting, RandomRouting)


def check_conflicts(intervention: Intervention, anatomy: Anatomy) -> None:
    """Hold the edits of an intervention against each other.

    Raises:
        InputError: two edits that cannot both be done at some token, both named; experts left out until none, or fewer than
            a token takes, remain.
    """
    whole = [edit for edit in intervention.edits if isinstance(edit, (Skip, Patch, MaskHead))]
    for part, edit in product(whole, intervention.edits):
        if part is not edit and (reason := _why_not_in_one_block(part, edit)):
            raise _contradiction(part, edit, reason)
    by_router: dict[tuple[int, str], list[ExpertEdit]] = {}
    for edit in intervention.edits:
        if isinstance(edit, ExpertEdit) and edit.strength != 0:
            for s in anatomy.moe:
                if s.block == edit.block and (edit.layers is None or s.layer in edit.layers):
                    by_router.setdefault((s.layer, s.block), []).append(edit)
    for (layer, block), edits in by_router.items():
        router = anatomy.moe_at(layer, block)
        assert router is not None
        for one, other in combinations(edits, 2):
            if one.where.overlaps(other.where) and (reason := _why_not_both(one, other)):
                raise _contradiction(one, other, f"in layer {layer}, {reason}")
        _check_left(edits, router)


def _contradiction(one: Edit, other: Edit, reason: str) -> InputError:
    return InputError(
        "two edits contradict each other",
        found=f"{one!r} and {other!r}: {reason}",
        fix="leave one out, or give them positions that do not overlap",
    )


def _why_not_in_one_block(one: Edit, other: Edit) -> str | None:
    """What two edits of one block cannot be together, whatever its router."""
    layers = set(one.layers or ()) & set(other.layers or ())
    meet = (one.layers is None or other.layers is None or layers) and one.where.overlaps(other.where)
    if not meet or one.strength == 0 or other.strength == 0:
        return None
    for skip, inner in ((one, other), (other, one)):
        if isinstance(skip, Skip) and (part := _part(inner)) and skip.part in ("block", part):
            return f"what is skipped is edited as well ({inner.kind})"
    for masked, inner in ((one, other), (other, one)):
        if isinstance(masked, MaskHead) and isinstance(inner, StreamEdit) and str(inner.site).startswith("attn."):
            return f"heads are masked where {inner.kind} acts on {inner.site}"
    if isinstance(one, Patch) and isinstance(other, Patch) and one.site == other.site and one.run != other.run:
        return f"each puts other vectors into {one.site}"
    if isinstance(one, MaskHead) and isinstance(other, MaskHead) and one.how != other.how and one.block == other.block:
        both = set(as_tuple(one.heads)) & set(as_tuple(other.heads))
        return f"head {min(both)} is masked in two ways" if both else None
    return None


def _part(edit: Edit) -> str | None:
    """The part of a block inside which an edit acts."""
    if isinstance(edit, (ExpertEdit, MaskHead)):
        return "mlp" if edit.block.startswith("mlp") else "attn"
    if isinstance(edit, StreamEdit):
        inner = str(edit.site).partition(".")[0]  # the part before the tensor's name, in attention or in the MLP
        return {ATTN_OUT: "attn", MLP_OUT: "mlp", "attn": "attn", "mlp": "mlp"}.get(inner)
    return None


def _why_not_both(one: Edit, other: Edit) -> str | None:
    return _one_way(one, other) or _one_way(other, one) or _alike(one, other)


def _one_way(first: Edit, second: Edit) -> str | None:
    """What the second cannot be beside the first."""
    if isinstance(first, Force) and isinstance(second, Ablate) and (both := _both(first, second)):
        return f"expert {both[0]} is forced and taken out"
    if isinstance(first, Force) and isinstance(second, Keep) and (lost := set(first.ids) - set(second.ids)):
        return f"expert {min(lost)} is forced, and not among those kept"
    if isinstance(first, _REPLACING) and (isinstance(second, _CHOOSING) or _around(second)):
        return f"{first.kind} puts other experts in the place of those that {second.kind} chose"
    return None


def _alike(one: Edit, other: Edit) -> str | None:
    """What two edits of a sort cannot be together."""
    if isinstance(one, _REPLACING) and isinstance(other, _REPLACING):
        return "each replaces the decision of the other"
    if isinstance(one, (TopK, RankRouting)) and isinstance(other, (TopK, RankRouting)):
        return "each sets how many experts a token takes"
    if isinstance(one, Keep) and isinstance(other, Keep) and not _both(one, other):
        return "they keep no expert in common"
    return None


def _check_left(edits: list[ExpertEdit], s: Sublayer) -> None:
    """Refuse what takes out all experts, or leaves a router fewer to choose from than a token takes."""
    n, k = s.n_choices, s.top_k or 1
    everywhere = {edit.positions for edit in edits}
    for positions in everywhere:
        here = [edit for edit in edits if edit.positions in (positions, "all")]
        out = list(_of(here, lambda edit: isinstance(edit, Ablate)))
        if len({e for edit in out for e in edit.ids} & set(range(s.n_experts or 0))) == s.n_experts:
            raise InputError(
                f"all {s.n_experts} experts of layer {s.layer} would be taken out",
                found=_named(out),
                fix=f"leave some in, or take the whole sublayer out: Skip(layer={s.layer}, part='mlp')",
            )
        limits = list(_of(here, lambda edit: isinstance(edit, Keep) or _around(edit)))
        kept = set(range(n))
        for edit in limits:
            kept = kept & set(edit.ids) if isinstance(edit, Keep) else kept - set(edit.ids)
        numbers: list[Edit] = [edit for edit in here if isinstance(edit, (TopK, RankRouting))]
        needed = max((_needed(edit) for edit in numbers), default=k)
        if len(kept) < needed:
            raise InputError(
                f"layer {s.layer} would have {len(kept)} experts left to choose from, and a token takes {needed}",
                found=_named([*limits, *numbers]),
                fix=f"leave at least {needed}, or lower their number with TopK",
            )
        forced = list(_of(here, lambda edit: isinstance(edit, Force)))
        if len({e for edit in forced for e in edit.ids}) > needed:
            raise InputError(
                f"more experts of layer {s.layer} are forced than the {needed} a token takes", found=_named(forced)
            )


def _needed(edit: Edit) -> int:
    if isinstance(edit, TopK):
        return edit.k
    assert isinstance(edit, RankRouting)
    return max((edit.ranks,) if isinstance(edit.ranks, int) else edit.ranks)


def _of(edits: list[ExpertEdit], fits: Callable[[Edit], bool]) -> Iterator[OfExperts]:
    for edit in edits:
        if isinstance(edit, OfExperts) and fits(edit):
            yield edit


def _around(edit: Edit) -> bool:
    return isinstance(edit, Ablate) and edit.how == "route_around"


def _both(one: OfExperts, other: OfExperts) -> list[int]:
    return sorted(set(one.ids) & set(other.ids))


def _named(edits: list[Edit] | list[OfExperts]) -> str:
    return " and ".join(repr(edit) for edit in edits)
