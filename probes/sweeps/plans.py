"""The interventions of each kind of sweep, in the order in which they run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from moescope.core.edit import Edit
from moescope.core.edit_kinds.experts import Ablate, How, Keep, RandomRouting, TopK, TopP
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.probes.anatomy import Anatomy, Sublayer
from moescope.probes.sweeps.scores import Across, Chosen, ExpertScores, random_experts
from moescope.probes.sweeps.variants import Variant

SHARES = (0.0625, 0.125, 0.25, 0.375, 0.5)
KEPT = (0.125, 0.25, 0.5, 0.75)
PROBABILITIES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)


def routers_of(anatomy: Anatomy, layers: Iterable[int] | None = None) -> list[Sublayer]:
    """The routers of some layers, or of all.

    Raises:
        InputError: a dense model, or a layer without a router.
    """
    if not anatomy.moe:
        raise InputError("this model has no routers", fix="sweeps of experts need a mixture-of-experts model")
    if layers is None:
        return list(anatomy.moe)
    wanted = list(layers)
    if wrong := [layer for layer in wanted if layer not in anatomy.moe_layers]:
        raise InputError(f"layer {wrong[0]} has no router", expected=", ".join(map(str, anatomy.moe_layers)))
    return [s for s in anatomy.moe if s.layer in wanted]


def every_expert(anatomy: Anatomy, how: How = "zero", layers: Iterable[int] | None = None) -> list[Variant]:
    """Every routed expert alone.

    Example:
        >>> import moescope as ms
        >>> len(every_expert(ms.load("demo").anatomy))
        96
    """
    found = [
        Ablate(layer=s.layer, block=s.block, experts=(expert,), how=how)
        for s in routers_of(anatomy, layers)
        for expert in range(s.n_experts or 0)
    ]
    return _targets(Intervention([edit], name=f"L{edit.layer}·E{edit.ids[0]} {how}") for edit in found)


def drop_sets(
    anatomy: Anatomy,
    scores: Sequence[ExpertScores],
    shares: Sequence[float] = SHARES,
    *,
    how: How = "route_around",
    across: Across = "layer",
    controls: int = 5,
    seed: int = 0,
    highest: bool = False,
) -> list[Variant]:
    """Experts taken out by score, a growing share, each beside as many random ones of the same layers.

    Raises:
        InputError: a share out of 0 … 1, or so small that no expert is taken.
    """
    found: list[Variant] = []
    for score in scores:
        for share in _checked(shares):
            chosen = score.lowest(share, across=across, least=_least(anatomy), highest=highest)
            if not chosen:
                raise InputError(f"a share of {share:g} takes out no expert", fix="take a larger share")
            end = "highest" if highest else "lowest"
            name = f"{end} by {score.name}"
            target = Intervention(_ablated(chosen, how), name=name)
            beside = [
                Intervention(_ablated(random_experts(anatomy, chosen, seed=seed, draw=draw), how), name="random")
                for draw in range(controls)
            ]
            found += _effect(target, beside, len(found) and found[-1].effect + 1)
    return found


def keep_sets(
    anatomy: Anatomy,
    scores: Sequence[ExpertScores],
    shares: Sequence[float] = KEPT,
    *,
    controls: int = 5,
    seed: int = 0,
) -> list[Variant]:
    """Only the top share of each router's experts by score, each beside as many random ones.

    Raises:
        InputError: a share out of 0 … 1.
    """
    found: list[Variant] = []
    for score in scores:
        for share in sorted(_checked(shares), reverse=True):
            chosen: Chosen = {}
            for s in anatomy.moe:
                number = max(_fewest(s), round(share * (s.n_experts or 0)))
                one = ExpertScores(score.name, {(s.layer, s.block): score.by_router[s.layer, s.block]})
                chosen |= one.lowest(number / (s.n_experts or 1), least=0, highest=True)
            target = Intervention(_kept(chosen), name=f"highest by {score.name}")
            beside = [
                Intervention(_kept(random_experts(anatomy, chosen, seed=seed, draw=draw)), name="random")
                for draw in range(controls)
            ]
            found += _effect(target, beside, len(found) and found[-1].effect + 1)
    return found


def fewer_or_more(
    anatomy: Anatomy, numbers: Sequence[int] | None = None, layers: Iterable[int] | None = None
) -> list[Variant]:
    """Another number of experts a token: in each layer alone, and in all.

    Args:
        anatomy: of the model.
        numbers: of experts; every one below the model's own, and twice that, where left out.
        layers: the layers taken alone; all that route where left out.
    """
    routers = routers_of(anatomy, layers)
    own = anatomy.top_k or 1
    wanted = numbers if numbers is not None else [*range(1, own), min(2 * own, anatomy.n_experts or own)]
    if wrong := [k for k in wanted if not 1 <= k <= min(s.n_experts or 1 for s in routers)]:
        raise InputError(f"a token cannot take {wrong[0]} experts", expected=f"1 to {anatomy.n_experts}")
    return _targets(
        Intervention([TopK(layer=s.layer, block=s.block, k=k) for s in part], name=f"top-{k}")
        for part in _each_and_all(routers)
        for k in wanted
    )


def by_mass(
    anatomy: Anatomy, shares: Sequence[float] = PROBABILITIES, layers: Iterable[int] | None = None
) -> list[Variant]:
    """As few experts a token as reach a share of its scores: in each layer alone, and in all."""
    return _targets(
        Intervention([TopP(layer=s.layer, block=s.block, p=p) for s in part], name=f"top-p {p:g}")
        for part in _each_and_all(routers_of(anatomy, layers))
        for p in _checked(shares)
    )


def random_routers(
    anatomy: Anatomy, *, seeds: int = 5, seed: int = 0, layers: Iterable[int] | None = None
) -> list[Variant]:
    """Random experts for every token: in each layer alone, and in all, under several seeds."""
    return _targets(
        Intervention(
            [RandomRouting(layer=s.layer, block=s.block, seed=seed + number) for s in part], name="random routing"
        )
        for part in _each_and_all(routers_of(anatomy, layers))
        for number in range(seeds)
    )


def doses(intervention: Intervention, strengths: Sequence[float]) -> list[Variant]:
    """The same edits at several strengths.

    Raises:
        InputError: an empty intervention, or no strength.
    """
    if not intervention.edits:
        raise InputError("an empty intervention has no dose", fix="give it edits")
    if not strengths:
        raise InputError("no strength is given", expected="numbers, such as 0, 0.5, 1, 2")
    called = intervention.name or "edits"
    return _targets(intervention.with_strength(strength).named(f"{called} × {strength:g}") for strength in strengths)


def _targets(interventions: Iterable[Intervention]) -> list[Variant]:
    return [Variant(intervention, effect=number) for number, intervention in enumerate(interventions)]


def _effect(target: Intervention, controls: Sequence[Intervention], number: int) -> list[Variant]:
    return [
        Variant(target, effect=number),
        *(Variant(control, "control", draw, number) for draw, control in enumerate(controls)),
    ]


def _ablated(chosen: Chosen, how: How) -> list[Edit]:
    return [Ablate(layer=layer, block=block, experts=found, how=how) for (layer, block), found in chosen.items()]


def _kept(chosen: Chosen) -> list[Edit]:
    return [Keep(layer=layer, block=block, experts=found) for (layer, block), found in chosen.items()]


def _each_and_all(routers: Sequence[Sublayer]) -> list[list[Sublayer]]:
    return [list(routers), *([s] for s in routers if len(routers) > 1)]


def _fewest(s: Sublayer) -> int:
    """Experts that a router cannot do without: as many as a token takes."""
    return max(1, s.top_k or 1)


def _least(anatomy: Anatomy) -> int:
    return max(_fewest(s) for s in anatomy.moe)


def _checked(shares: Sequence[float]) -> list[float]:
    if wrong := [share for share in shares if not 0 < share <= 1]:
        raise InputError(f"{wrong[0]:g} is no share", expected="numbers over 0, up to 1")
    if not shares:
        raise InputError("no share is given", expected="numbers over 0, up to 1")
    return sorted(dict.fromkeys(map(float, shares)))


def as_floats(text: str) -> list[float]:
    """Numbers of a list such as `0.1,0.25,0.5`.

    Raises:
        InputError: not a number.
    """
    found: list[Any] = text.replace(",", " ").split()
    try:
        return [float(part) for part in found]
    except ValueError:
        raise InputError(f"{text!r} is no list of numbers", expected="such as 0.1,0.25,0.5") from None
