"""Mixing routing with that of neighbours: planted neighbours, a kernel by hand, own routing changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import moescope as ms
from moescope.core.errors import InputError
from moescope.probes.attribution.decoding_pathways import (
    Pathways,
    best_bandwidth,
    neighbour_weights,
    pathways,
    remix,
)
from moescope.probes.edits.session import edited


def _planted(vectors: Any, routed: Any) -> Pathways:
    return Pathways(((0, "mlp"),), (np.asarray(routed, float),), np.asarray(vectors, float), None)


def test_shares_are_the_routers_probabilities_at_the_last_token(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], plain_passes: Callable[..., Any]
) -> None:
    module, prompts = tiny_model("olmoe"), token_ids([4, 7])
    found = pathways(ms.load(module), prompts, site_layer=0)
    assert found.places == ((0, "mlp"), (1, "mlp"))
    for number, prompt in enumerate(prompts):
        batch = plain_passes(module, [prompt])[0]
        for layer in (0, 1):
            logits = batch.router_inputs[layer][-1] @ module.model.layers[layer].mlp.gate.weight.T
            assert found.shares[layer][number] == pytest.approx(logits.softmax(-1).detach().numpy(), abs=1e-6)
        assert found.vectors[number] == pytest.approx(batch.resid[0][0].mean(0).numpy(), abs=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral"])
def test_a_prompt_mixed_with_its_own_routing_stays_as_it_is(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], family: str
) -> None:
    module = tiny_model(family)
    model, prompts = ms.load(module), token_ids([6, 9])
    ids = torch.tensor([prompts[0]])
    same = remix(model, pathways(model, [prompts[0]]), prompts[0])
    other = remix(model, pathways(model, [prompts[1]]), prompts[0])
    with torch.no_grad():
        plain = module(input_ids=ids).logits
        with edited(model, same):
            assert torch.allclose(module(input_ids=ids).logits, plain, atol=1e-4)
        with edited(model, other):
            mixed = module(input_ids=ids).logits
    assert torch.allclose(mixed[:, :-1], plain[:, :-1], atol=1e-4), "tokens before the last are not mixed"
    assert (mixed[:, -1] - plain[:, -1]).abs().max() > 1e-2


def test_a_reference_with_share_1_takes_the_place_of_the_routing(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], plain_passes: Callable[..., Any]
) -> None:
    module, prompts = tiny_model("mixtral"), token_ids([6, 9])
    model = ms.load(module)
    donor = pathways(model, [prompts[1]])
    seen: list[Any] = []
    experts = module.model.layers[0].mlp.experts
    handle = experts.register_forward_pre_hook(lambda _m, given: seen.append((given[1].clone(), given[2].clone())))
    with torch.no_grad(), edited(model, remix(model, donor, prompts[0])):
        module(input_ids=torch.tensor([prompts[0]]))
    handle.remove()
    ids, weights = seen[-1]
    probabilities = donor.shares[0][0]
    first, second = np.argsort(-probabilities)[:2]
    assert sorted(ids[-1].tolist()) == sorted([first, second])
    total = probabilities[first] + probabilities[second]
    expected = {int(e): probabilities[e] / total for e in (first, second)}
    assert dict(zip(ids[-1].tolist(), weights[-1].tolist(), strict=True)) == pytest.approx(expected, abs=1e-5)


def test_the_nearest_are_weighed_by_their_cosine() -> None:
    references = np.array([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0], [-1.0, 0.0]])
    # cosines with (1, 0): 1, 0.6, 0, −1
    assert neighbour_weights(references, np.array([2.0, 0.0]), neighbours=2).tolist() == pytest.approx(
        [1 / 1.6, 0.6 / 1.6, 0, 0]
    )
    assert neighbour_weights(references, np.array([2.0, 0.0]), neighbours=4).tolist() == pytest.approx(
        [1 / 1.6, 0.6 / 1.6, 0, 0]
    )
    with pytest.raises(InputError, match="like this one"):
        neighbour_weights(references[:1], np.array([-1.0, 0.0]), neighbours=1)


def test_the_kernel_is_a_gaussian_of_the_distance_on_the_sphere() -> None:
    generator = np.random.default_rng(0)
    references, query = generator.normal(size=(6, 4)), generator.normal(size=4)
    terms = []
    for row in references:
        gap = [x / math.hypot(*row) - y / math.hypot(*query) for x, y in zip(row, query, strict=True)]
        terms.append(math.exp(-sum(g * g for g in gap) / (2 * 0.3**2)))
    expected = [term / sum(terms) for term in terms]
    assert neighbour_weights(references, query, how="kernel", bandwidth=0.3).tolist() == pytest.approx(expected)


def test_bandwidth_leaves_each_prompt_out_by_hand() -> None:
    generator = np.random.default_rng(1)
    vectors = generator.normal(size=(7, 3))
    routed = generator.dirichlet(np.ones(4), size=7)
    found = best_bandwidth(_planted(vectors, routed))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    gaps = [math.dist(unit[i], unit[j]) for i in range(7) for j in range(i)]
    tried, errors = [math.sqrt(np.median(np.square(gaps))) * 2 ** (p / 2) for p in range(-8, 7)], []
    for width in tried:
        error = 0.0
        for i in range(7):
            others = [j for j in range(7) if j != i]
            terms = [math.exp(-(math.dist(unit[i], unit[j]) ** 2) / (2 * width**2)) for j in others]
            guess = sum(t * routed[j] for t, j in zip(terms, others, strict=True)) / sum(terms)
            error += float(((guess - routed[i]) ** 2).sum())
        errors.append(error)
    assert found == pytest.approx(tried[int(np.argmin(errors))])


def test_bandwidth_is_narrow_for_clusters_and_wide_for_noise() -> None:
    generator = np.random.default_rng(2)
    centres = np.eye(3)
    near = np.repeat(centres, 5, 0) + 0.01 * generator.normal(size=(15, 3))
    clustered = best_bandwidth(_planted(near, np.repeat(np.eye(3), 5, 0)))
    noise = best_bandwidth(_planted(near, generator.dirichlet(np.ones(3), size=15)))
    assert clustered < noise


def test_a_planted_neighbour_gives_its_routing(tiny_model: Callable[..., Any]) -> None:
    model = ms.load(tiny_model("mixtral"))
    prompts = [[5], [6], [7]]
    vectors = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    references = pathways(model, prompts, vectors=vectors)
    for how in ({"how": "nearest"}, {"how": "kernel", "bandwidth": 0.05}):
        cut = remix(model, references, [9, 9, 9], vector=[0.0, 1.0, 0.01], neighbours=1, **how)
        for edit, shares in zip(cut.edits, references.shares, strict=True):
            assert edit.reference == pytest.approx(shares[1].tolist(), abs=1e-6)
            assert edit.positions == "2:"


def test_generated_tokens_are_mixed_too(tiny_model: Callable[..., Any], token_ids: Callable[..., Any]) -> None:
    module = tiny_model("mixtral", eos_token_id=None)
    model, prompts = ms.load(module), token_ids([6, 9])
    cut = remix(model, pathways(model, [prompts[1]]), prompts[0])
    seen: list[Any] = []
    experts = module.model.layers[1].mlp.experts
    handle = experts.register_forward_pre_hook(lambda _m, given: seen.append(sorted(given[1][-1].tolist())))
    with torch.no_grad(), edited(model, cut):
        module.generate(torch.tensor([prompts[0]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    handle.remove()
    donor = sorted(np.argsort(-pathways(model, [prompts[1]]).shares[1][0])[:2].tolist())
    assert len(seen) == 4
    assert all(chosen == donor for chosen in seen)


def test_senseless_references_are_refused(tiny_model: Callable[..., Any], token_ids: Callable[..., Any]) -> None:
    model, prompts = ms.load(tiny_model("mixtral")), token_ids([4, 5])
    references = pathways(model, prompts)
    with pytest.raises(InputError, match="no experts"):
        pathways(ms.load(tiny_model("llama")), prompts)
    with pytest.raises(InputError, match="no block 7"):
        pathways(model, prompts, site_layer=7)
    with pytest.raises(InputError, match="at least one layer"):
        pathways(model, prompts, layers=0)
    with pytest.raises(InputError, match="do not belong"):
        pathways(model, prompts, vectors=[[1.0, np.nan], [1.0, 1.0]])
    with pytest.raises(InputError, match="three prompts"):
        remix(model, references, prompts[0], how="kernel")
    with pytest.raises(InputError, match="another width"):
        remix(model, references, prompts[0], vector=[1.0])
    with pytest.raises(InputError, match="vectors of their own"):
        remix(model, pathways(model, prompts, vectors=np.eye(2)), prompts[0])
    with pytest.raises(InputError, match="another model"):
        remix(ms.load(tiny_model("qwen3_moe")), references, prompts[0])
