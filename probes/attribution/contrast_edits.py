"""From a ranking of experts to interventions, as the authors of expert steering build them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from moescope.core.edit import Edit
from moescope.core.edit_kinds.experts import Ablate, Bias, Force, Scale
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.probes.anatomy import Anatomy

SuppressBy = Literal["route_around", "renormalise", "zero", "bias", "scale"]
StimulateBy = Literal["force", "bias", "scale"]
Place = tuple[int, str]

AMOUNT = 2.0


@dataclass(frozen=True)
class RankedExpert:
    """An expert and how much more the first set uses it than the second.

    Attributes:
        layer, block, expert: which.
        value: the difference; above 0 where the first set uses it more.
    """

    layer: int
    block: str
    expert: int
    value: float

    @property
    def name(self) -> str:
        """`L3·E7`, or `L3 attn·E7` where the router is not the layer's MLP."""
        return f"L{self.layer}{'' if self.block == 'mlp' else f' {self.block}'}·E{self.expert}"


@dataclass(frozen=True)
class Chosen:
    """Experts taken from a ranking.

    Attributes:
        experts: by size of their difference.
        skipped: those that would have been next in their layer, where it had its fill.
    """

    experts: tuple[RankedExpert, ...]
    skipped: tuple[RankedExpert, ...] = ()


def choose(ranking: Iterable[RankedExpert], number: int, *, sign: Literal[1, -1], most: Mapping[Place, int]) -> Chosen:
    """The first experts of a ranking by size whose difference has a sign, at most so many a router.

    Those over the limit of their router are skipped, and count among the `number`: so the authors' code walks its list, and
    fewer experts may come out than were asked for.

    Args:
        ranking: in any order.
        number: how many rows to take.
        sign: 1 for experts of the first set, −1 for those of the second.
        most: (layer, block) → how many a router may have.

    Raises:
        InputError: no expert has a difference of that sign.

    Example:
        >>> ranked = [RankedExpert(0, "mlp", e, v) for e, v in enumerate((0.1, 0.4, -0.9, 0.3))]
        >>> [e.expert for e in choose(ranked, 3, sign=1, most={(0, "mlp"): 2}).experts]
        [1, 3]
    """
    by_size = sorted(
        (e for e in ranking if e.value * sign > 0), key=lambda e: (-abs(e.value), e.layer, e.block, e.expert)
    )
    if not by_size:
        raise InputError(
            f"no expert is used more by the {'first' if sign > 0 else 'second'} set than by the other",
            fix="give sets of prompts that differ in what they are about",
        )
    taken: defaultdict[Place, int] = defaultdict(int)
    kept: list[RankedExpert] = []
    skipped: list[RankedExpert] = []
    for expert in by_size[:number]:
        place = expert.layer, expert.block
        full = taken[place] >= most.get(place, 0)
        (skipped if full else kept).append(expert)
        taken[place] += not full
    return Chosen(tuple(kept), tuple(skipped))


def most_forced(anatomy: Anatomy) -> dict[Place, int]:
    """(layer, block) → how many experts can be forced at once: its top-k."""
    return {(s.layer, s.block): int(s.top_k or 0) for s in anatomy.moe}


def most_removed(anatomy: Anatomy) -> dict[Place, int]:
    """(layer, block) → how many experts can be left out while the router still has k to choose."""
    return {(s.layer, s.block): max(0, int(s.n_experts or 0) - int(s.top_k or 0)) for s in anatomy.moe}


def suppress(experts: Sequence[RankedExpert], *, by: SuppressBy, amount: float | None = None) -> tuple[Edit, ...]:
    """Edits that take experts out, or turn them down; one a router.

    Args:
        experts: which.
        by: `route_around`, the router takes its next choice (SteerMoE puts the log-probability 0.01 under the smallest: the
            same choice, and the same weights but for the little it leaves to those experts); `renormalise`, weight 0 and
            the other slots scaled up (fTRI); `zero`, the contribution alone; `bias`, `amount` less on the router logit;
            `scale`, the weight divided by `amount`.
        amount: of `bias` (router logits) and `scale` (a factor); 2 where not given.
    """
    value = AMOUNT if amount is None else amount
    found: list[Edit] = []
    for (layer, block), ids in _by_router(experts).items():
        if by == "bias":
            found.append(Bias(layer=layer, block=block, experts=ids, value=-value))
        elif by == "scale":
            found.append(Scale(layer=layer, block=block, experts=ids, factor=1 / value))
        else:
            found.append(Ablate(layer=layer, block=block, experts=ids, how=by))
    return tuple(found)


def stimulate(experts: Sequence[RankedExpert], *, by: StimulateBy, amount: float | None = None) -> tuple[Edit, ...]:
    """Edits that bring experts in, or turn them up; one a router.

    Args:
        experts: which.
        by: `force`, every token takes them, with the weight of a log-probability 0.01 over the largest (SteerMoE); `bias`,
            `amount` more on the router logit (CEAI); `scale`, the weight times `amount` where they are chosen (RICE).
        amount: of `bias` (router logits) and `scale` (a factor); 2 where not given.
    """
    value = AMOUNT if amount is None else amount
    found: list[Edit] = []
    for (layer, block), ids in _by_router(experts).items():
        if by == "bias":
            found.append(Bias(layer=layer, block=block, experts=ids, value=value))
        elif by == "scale":
            found.append(Scale(layer=layer, block=block, experts=ids, factor=value))
        else:
            found.append(Force(layer=layer, block=block, experts=ids))
    return tuple(found)


def steer(
    ranking: Sequence[RankedExpert], anatomy: Anatomy, *, activate: int, deactivate: int, name: str = "steer"
) -> Intervention:
    """SteerMoE's intervention: experts of the first set forced, those of the second left out.

    Args:
        ranking: of risk differences, in any order.
        anatomy: of the model; no more than k experts of a router are forced, and k are always left to choose from.
        activate, deactivate: how many rows of either sign to take; one of them may be 0.
        name: of the intervention.

    Example:
        >>> import moescope as ms
        >>> ranked = [RankedExpert(0, "mlp", e, v) for e, v in ((1, 0.4), (2, -0.9))]
        >>> [edit.kind for edit in steer(ranked, ms.load("demo").anatomy, activate=1, deactivate=1).edits]
        ['force', 'ablate']
    """
    edits: tuple[Edit, ...] = ()
    if activate:
        edits += stimulate(choose(ranking, activate, sign=1, most=most_forced(anatomy)).experts, by="force")
    if deactivate:
        edits += suppress(choose(ranking, deactivate, sign=-1, most=most_removed(anatomy)).experts, by="route_around")
    return Intervention(edits, name=name, anatomy=anatomy.digest)


def _by_router(experts: Sequence[RankedExpert]) -> dict[Place, tuple[int, ...]]:
    found: dict[Place, tuple[int, ...]] = {}
    for expert in sorted(experts, key=lambda e: (e.layer, e.block)):
        place = expert.layer, expert.block
        found[place] = (*found.get(place, ()), expert.expert)
    return found
