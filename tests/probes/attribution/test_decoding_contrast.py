"""Self-contrast against a brute force without cache; the closed form of its scores; refusals."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import moescope as ms
from moescope.core.edit_kinds.experts import RankRouting, Scale
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.probes.attribution.decoding_contrast import contrast_scores, self_contrast


@contextlib.contextmanager
def _second_choice_by_hand(module: Any) -> Iterator[None]:
    """Every token goes to the second largest logit alone; its weight is 1, or its probability where nothing renormalises."""
    for layer in module.model.layers:
        gate, experts = layer.mlp.gate, layer.mlp.experts
        plain, renormalised = experts.forward, getattr(module.config, "norm_topk_prob", True)

        def forward(
            hidden: Any, ids: Any, weights: Any, *, gate: Any = gate, plain: Any = plain, one: bool = renormalised
        ) -> Any:
            logits = (hidden.reshape(-1, hidden.shape[-1]) @ gate.weight.T).float()
            rank = logits.argsort(-1, descending=True)[:, 1:2]
            weight = torch.ones_like(weights[:, :1]) if one else logits.softmax(-1).gather(-1, rank).to(weights.dtype)
            return plain(hidden, rank, weight)

        experts.forward = forward
    try:
        yield
    finally:
        for layer in module.model.layers:
            del layer.mlp.experts.forward


def _brute_force(module: Any, prompt: list[int], tokens: int, alpha: float, beta: float) -> tuple[list[int], list[int]]:
    contrasted, greedy = list(prompt), list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            strong = module(input_ids=torch.tensor([contrasted]), use_cache=False).logits[0, -1].tolist()
            with _second_choice_by_hand(module):
                weak = module(input_ids=torch.tensor([contrasted]), use_cache=False).logits[0, -1].tolist()
            least = math.log(alpha) + max(strong)
            allowed = [v for v in range(len(strong)) if strong[v] >= least]
            contrasted.append(max(allowed, key=lambda v: (1 + beta) * strong[v] - beta * weak[v]))
            greedy.append(int(module(input_ids=torch.tensor([greedy]), use_cache=False).logits[0, -1].argmax()))
    return contrasted[len(prompt) :], greedy[len(prompt) :]


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral"])
def test_self_contrast_equals_a_brute_force_without_cache(
    tiny_model: Callable[..., Any], token_ids: Callable[..., list[list[int]]], family: str
) -> None:
    module = tiny_model(family, eos_token_id=None)
    prompts = token_ids([5, 9, 1], seed=2)
    found = self_contrast(ms.load(module), prompts, tokens=7, alpha=0.01, beta=1.0)
    for prompt, one in zip(prompts, found, strict=True):
        contrasted, greedy = _brute_force(module, prompt, 7, 0.01, 1.0)
        assert list(one.ids) == contrasted
        assert list(one.plain_ids) == greedy
        assert one.prompt == tuple(prompt)
        assert one.text is None
    assert any(any(one.overruled) for one in found), "nothing was overruled, so nothing was tried"
    assert any(one.ids != one.plain_ids for one in found)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "deepseek_v3"])
def test_without_contrast_it_is_greedy_decoding(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], family: str
) -> None:
    model = ms.load(tiny_model(family, eos_token_id=None))
    prompts = token_ids([4, 6])
    for options in ({"beta": 0.0}, {"alpha": 1.0}):
        for one in self_contrast(model, prompts, tokens=6, **options):
            assert one.ids == one.plain_ids
            assert not any(one.overruled)
    same = Intervention([Scale(layer=1, experts=[0], factor=1.0)])
    for one in self_contrast(model, prompts, tokens=6, weak=same):
        assert one.ids == one.plain_ids


def test_scores_follow_their_formula() -> None:
    strong, weak = torch.tensor([[3.0, 2.5, 0.5, -8.0]]), torch.tensor([[2.0, 0.0, -9.0, -99.0]])
    # ln 0.1 = −2.303: tokens with a strong logit below 0.697 are left out, whatever their score.
    found = contrast_scores(strong, weak, alpha=0.1, beta=0.5)[0].tolist()
    assert found == pytest.approx([1.5 * 3 - 1.0, 1.5 * 2.5, -math.inf, -math.inf])


def test_continuations_end_after_the_end_of_sequence_token(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any]
) -> None:
    prompts = token_ids([5, 8])
    free = self_contrast(ms.load(tiny_model("qwen3_moe", eos_token_id=None)), prompts, tokens=8)
    end = free[0].ids[2]
    module = tiny_model("qwen3_moe", eos_token_id=end)
    bounded = self_contrast(ms.load(module), prompts, tokens=8)
    for one, before in zip(bounded, free, strict=True):
        for ids, whole in ((one.ids, before.ids), (one.plain_ids, before.plain_ids)):
            stop = whole.index(end) + 1 if end in whole else len(whole)
            assert ids == whole[:stop]
        assert len(one.overruled) == len(one.ids)


def test_the_model_is_as_before(tiny_model: Callable[..., Any], token_ids: Callable[..., Any]) -> None:
    module = tiny_model("olmoe")
    ids = torch.tensor(token_ids([6]))
    with torch.no_grad():
        before = module(input_ids=ids).logits
        self_contrast(ms.load(module), token_ids([4]), tokens=2)
        assert torch.equal(module(input_ids=ids).logits, before)


def test_text_comes_back_as_text(demo_model: Any) -> None:
    found = self_contrast(demo_model, "In the beginning", tokens=5)[0]
    assert found.text == demo_model.tokenizer.decode(list(found.ids))
    assert found.plain_text == demo_model.tokenizer.decode(list(found.plain_ids))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"alpha": 0.0}, "alpha"), ({"alpha": 1.5}, "alpha"), ({"beta": -1.0}, "beta"), ({"tokens": 0}, "at least one token"),
     ({"tokens": 60}, "context"), ({"weak": Intervention([RankRouting(ranks=(9,))])}, "rank")],
)  # fmt: skip
def test_senseless_options_are_refused(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        self_contrast(ms.load(tiny_model("qwen3_moe")), token_ids([9]), **{"tokens": 4, **options})


@pytest.mark.parametrize(
    ("prompts", "words"), [([], "no prompt"), ([[]], "no prompt"), ([[97]], "no prompt"), ("x", "tokenizer")]
)
def test_senseless_prompts_are_refused(tiny_model: Callable[..., Any], prompts: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        self_contrast(ms.load(tiny_model("qwen3_moe")), prompts)


def test_a_dense_model_is_refused(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match="no experts to weaken"):
        self_contrast(ms.load(tiny_model("llama")), [1, 2])
