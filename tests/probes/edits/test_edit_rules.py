"""Edits of a router against a router written out in plain loops: which experts, and with what weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import moescope as ms
import moescope.edits as e
from moescope.probes.edits.session import edited

FAMILIES = ("qwen3_moe", "olmoe", "mixtral", "qwen2_moe", "deepseek_v3")
RENORMALISED = {"qwen3_moe", "mixtral", "deepseek_v3"}
LENGTHS = [13, 9, 17]


class Router:
    """The first router of a tiny model, by hand: logits from its weights, the decision in loops."""

    def __init__(self, family: str, module: Any) -> None:
        self.family = family
        self.layer = 1 if family == "deepseek_v3" else 0
        gate = module.model.layers[self.layer].mlp.gate
        self.weight = gate.weight.detach().float()
        self.bias = gate.e_score_correction_bias.tolist() if family == "deepseek_v3" else None
        self.n = len(self.weight)
        self.k = {"olmoe": 3, "deepseek_v3": 3}.get(family, 2)

    def logits(self, hidden: torch.Tensor) -> list[float]:
        return (self.weight @ hidden.float()).tolist()

    def scores(self, logits: list[float]) -> list[float]:
        if self.family == "deepseek_v3":
            return [1 / (1 + math.exp(-z)) if z > -700 else 0.0 for z in logits]
        top = max(logits)
        powers = [math.exp(z - top) for z in logits]
        return [p / sum(powers) for p in powers]

    def order(self, logits: list[float], barred: set[int], forced: set[int]) -> list[int]:
        """Experts that may be chosen, the first choice first."""
        worth = self.scores(logits)
        if self.bias is not None:
            worth = [w + b for w, b in zip(worth, self.bias, strict=True)]
        open_ = [x for x in range(self.n) if x not in barred]
        if self.family == "deepseek_v3":  # two groups of four, of which the better is open
            groups = [[x for x in open_ if x // 4 == g] for g in (0, 1)]
            value = [sum(sorted((worth[x] for x in group), reverse=True)[:2]) for group in groups]
            best = groups[0] if value[0] >= value[1] else groups[1]
            open_ = [x for x in open_ if x in best or x in forced]
        return sorted(open_, key=lambda x: (x in forced, worth[x]), reverse=True)

    def weights(self, logits: list[float], chosen: list[int]) -> dict[int, float]:
        scores = self.scores(logits)
        total = sum(scores[x] for x in chosen) if self.family in RENORMALISED else 1.0
        return {x: scores[x] / total * (2.5 if self.family == "deepseek_v3" else 1.0) for x in chosen}

    def decide(
        self,
        logits: list[float],
        k: int | None = None,
        barred: set[int] = frozenset(),  # type: ignore[assignment]  # an empty default
        forced: set[int] = frozenset(),  # type: ignore[assignment]  # an empty default
    ) -> dict[int, float]:
        logits = [-math.inf if x in barred else z for x, z in enumerate(logits)]
        return self.weights(logits, self.order(logits, set(barred), set(forced))[: k or self.k])


def raised(logits: list[float], experts: set[int]) -> list[float]:
    return [max(logits) + 0.01 if x in experts else z for x, z in enumerate(logits)]


def plus(logits: list[float], expert: int, value: float) -> list[float]:
    return [z + value if x == expert else z for x, z in enumerate(logits)]


@pytest.fixture
def seen(tiny_model: Callable[..., Any], token_ids: Callable[..., Any], plain_passes: Callable[..., Any]) -> Any:
    """`seen(family, edit)`: the router by hand, and (logits, decision) of every real token of the edited first router."""

    def run(family: str, *edits_: e.Edit, **config: Any) -> tuple[Router, list[tuple[list[float], dict[int, float]]]]:
        module = tiny_model(family, **config)
        router = Router(family, module)
        model = ms.load(module)
        with edited(model, e.Intervention(edits_)):
            (batch,) = plain_passes(module, token_ids(LENGTHS))
        _, ids, weights, _ = batch.experts[router.layer]
        inputs = batch.router_inputs[router.layer].reshape(len(ids), -1)
        found = []
        for token, real in enumerate(batch.mask.flatten().tolist()):
            if real:
                decision: dict[int, float] = {}
                for x, w in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
                    assert x not in decision, "an expert twice"
                    decision[x] = w
                found.append((router.logits(inputs[token]), decision))
        return router, found

    return run


def same(found: dict[int, float], expected: dict[int, float]) -> bool:
    """Equal where weights are not 0: slots of weight 0 do nothing."""
    found = {x: w for x, w in found.items() if w != 0}
    expected = {x: w for x, w in expected.items() if w != 0}
    return set(found) == set(expected) and all(math.isclose(found[x], expected[x], rel_tol=1e-4) for x in expected)


def held(seen: Any, family: str, edits_: tuple[e.Edit, ...], by_hand: Callable[[Router, list[float]], Any]) -> None:
    router, decisions = seen(family, *edits_)
    expected = [by_hand(router, logits) for logits, _ in decisions]
    assert len(decisions) == sum(LENGTHS)
    assert all(same(found, hand) for (_, found), hand in zip(decisions, expected, strict=True))
    # and the edit did something
    assert not all(same(router.decide(logits), hand) for (logits, _), hand in zip(decisions, expected, strict=True))


def layer(family: str) -> int:
    return 1 if family == "deepseek_v3" else 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_router_by_hand_is_the_model_s(seen: Any, family: str) -> None:
    router, decisions = seen(family)
    assert all(same(found, router.decide(logits)) for logits, found in decisions)


@pytest.mark.parametrize("family", FAMILIES)
def test_route_around_takes_the_next_choice(seen: Any, family: str) -> None:
    edit = e.Ablate(layer=layer(family), experts=[1], how="route_around")
    held(seen, family, (edit,), lambda router, z: router.decide(z, barred={1}))


@pytest.mark.parametrize("family", FAMILIES)
def test_keep_routes_among_those_kept(seen: Any, family: str) -> None:
    edit = e.Keep(layer=layer(family), experts=[0, 1, 2])
    held(seen, family, (edit,), lambda router, z: router.decide(z, barred=set(range(3, router.n))))


@pytest.mark.parametrize("family", FAMILIES)
def test_forced_experts_are_chosen_with_the_rule_s_weight_over_the_largest(seen: Any, family: str) -> None:
    edit = e.Force(layer=layer(family), experts=[0, 3])
    held(seen, family, (edit,), lambda router, z: router.decide(raised(z, {0, 3}), forced={0, 3}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_given_weight_is_given(seen: Any, family: str) -> None:
    def by_hand(router: Router, logits: list[float]) -> dict[int, float]:
        return router.decide(raised(logits, {2}), forced={2}) | {2: 0.125}

    held(seen, family, (e.Force(layer=layer(family), experts=2, weight=0.125),), by_hand)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_bias_is_added_to_the_logits(seen: Any, family: str, strength: float) -> None:
    edit = e.Bias(layer=layer(family), experts=[2], value=1.5, strength=strength)
    held(seen, family, (edit,), lambda router, z: router.decide(plus(z, 2, 1.5 * strength)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("k", [1, 4])
def test_another_number_of_experts(seen: Any, family: str, k: int) -> None:
    router, decisions = seen(family, e.TopK(layer=layer(family), k=k))
    assert all(len(found) == k for _, found in decisions)
    assert all(same(found, router.decide(logits, k=k)) for logits, found in decisions)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_ranks_alone(seen: Any, family: str) -> None:
    def by_hand(router: Router, logits: list[float]) -> dict[int, float]:
        order = router.order(logits, set(), set())
        return router.weights(logits, [order[1], order[3]])

    held(seen, family, (e.RankRouting(layer=layer(family), ranks=[2, 4]),), by_hand)


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_probabilities(seen: Any, family: str) -> None:
    def by_hand(router: Router, logits: list[float]) -> dict[int, float]:
        scores = router.scores(logits)
        total = sum(scores)
        mixed = [0.9 * s + 0.1 * total * (0.5 if x < 2 else 0.0) for x, s in enumerate(scores)]
        if family != "deepseek_v3":
            return router.decide([math.log(s) for s in mixed])
        return router.decide([math.log(s / (1 - s)) for s in (min(s, 1 - 1e-6) for s in mixed)])  # no sigmoid reaches 1

    n = 4 if family == "mixtral" else 6 if family == "qwen2_moe" else 8
    edit = e.MixRouting(layer=layer(family), reference=[0.5, 0.5, *[0.0] * (n - 2)], share=0.1)
    held(seen, family, (edit,), by_hand)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_top_p_keeps_as_few_as_reach_the_share(seen: Any, family: str, renormalise: bool) -> None:
    def by_hand(router: Router, logits: list[float]) -> dict[int, float]:
        decision, scores = router.decide(logits), router.scores(logits)
        reached, kept = 0.0, []
        for x in sorted(decision, key=lambda x: -scores[x]):
            if reached < 0.4:
                kept.append(x)
            reached += scores[x] / sum(scores)
        scale = sum(decision.values()) / sum(decision[x] for x in kept) if renormalise else 1.0
        return {x: decision[x] * scale for x in kept}

    held(seen, family, (e.TopP(layer=layer(family), p=0.4, renormalise=renormalise),), by_hand)


def test_edits_of_one_router_are_decided_together(seen: Any) -> None:
    """Bias, Keep, Force and TopK make one decision; a scale comes after it; Ablate zero leaves the others' weights."""
    edits_ = (
        e.Scale(layer=0, experts=[4], factor=3.0),  # given first, and still last: it acts on weights
        e.Bias(layer=0, experts=[4], value=1.0),
        e.Keep(layer=0, experts=[0, 1, 2, 4, 5]),
        e.Force(layer=0, experts=[0]),
        e.TopK(layer=0, k=3),
        e.Ablate(layer=0, experts=[1]),
    )

    def by_hand(router: Router, logits: list[float]) -> dict[int, float]:
        logits = plus(logits, 4, 1.0)
        out = {3, 6, 7}
        found = router.decide(raised(logits, {0}), k=3, barred=out, forced={0})
        return {x: w * (3.0 if x == 4 else 1.0) * (0.0 if x == 1 else 1.0) for x, w in found.items()}

    held(seen, "qwen3_moe", edits_, by_hand)


def test_swapped_and_scaled_slots(seen: Any) -> None:
    def swapped(router: Router, logits: list[float]) -> dict[int, float]:
        return {{1: 2, 2: 1}.get(x, x): w for x, w in router.decide(logits).items()}

    def scaled(router: Router, logits: list[float]) -> dict[int, float]:
        return {x: w * (0.25 if x == 2 else 1.0) for x, w in router.decide(logits).items()}

    held(seen, "olmoe", (e.SwapExperts(layer=0, first=1, second=2),), swapped)
    held(seen, "olmoe", (e.Scale(layer=0, experts=[2], factor=-0.5, strength=0.5),), scaled)


def test_renormalised_ablation_keeps_the_sum(seen: Any) -> None:
    def by_hand(router: Router, logits: list[float]) -> dict[int, float]:
        found = router.decide(logits)
        left = {x: w for x, w in found.items() if x not in (1, 2)}
        return {x: w * sum(found.values()) / sum(left.values()) for x, w in left.items()}

    held(seen, "olmoe", (e.Ablate(layer=0, experts=[1, 2], how="renormalise"),), by_hand)


def test_random_experts_are_spread_seeded_and_never_twice(seen: Any) -> None:
    _, first = seen("olmoe", e.RandomRouting(layer=0, seed=3))
    router, again = seen("olmoe", e.RandomRouting(layer=0, seed=3))
    _, other = seen("olmoe", e.RandomRouting(layer=0, seed=4))
    assert [d for _, d in first] == [d for _, d in again]
    assert [d for _, d in first] != [d for _, d in other]
    chosen = [x for _, d in first for x in d]
    assert set(chosen) == set(range(8))
    assert max(chosen.count(x) for x in range(8)) < 2.2 * len(chosen) / 8
    # the token's own weights, in the order of its slots
    for logits, found in first:
        assert sorted(found.values()) == pytest.approx(sorted(router.decide(logits).values()), rel=1e-4)
