"""The rule from logits to decision: named rightly where it holds, refused where it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moescope.probes.rule_search import find_rule


def planted(score: str, *, renormalise: bool, scale: float, bias: float = 0.0) -> tuple[Any, Any, Any]:
    """Logits of 400 tokens over 16 experts, and the top 4 with their weights by the rule."""
    logits = torch.randn(400, 16, generator=torch.Generator().manual_seed(1))
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    ids = (scores + bias * torch.arange(16)).topk(4).indices
    weights = scores.gather(-1, ids)
    weights = weights / weights.sum(-1, keepdim=True) if renormalise else weights
    return logits, ids, scale * weights


@pytest.mark.parametrize("scale", [1.0, 2.5, 16.0])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_planted_rule_is_found(score: str, renormalise: bool, scale: float) -> None:
    rule = find_rule(*planted(score, renormalise=renormalise, scale=scale)).rule
    assert rule.verified
    assert (rule.score, rule.renormalise, rule.agreement, rule.tokens) == (score, renormalise, 1.0, 400)
    assert rule.scale == pytest.approx(scale, rel=1e-4)


def test_the_order_of_slots_does_not_matter() -> None:
    logits, ids, weights = planted("softmax", renormalise=True, scale=1.0)
    rule = find_rule(logits, ids.flip(-1), weights.flip(-1)).rule
    assert (rule.score, rule.renormalise, rule.verified) == ("softmax", True, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_rounded_to_half_precision_still_verify(dtype: torch.dtype) -> None:
    logits, ids, weights = planted("softmax", renormalise=False, scale=1.0)
    rule = find_rule(logits, ids, weights.to(dtype)).rule
    assert (rule.score, rule.renormalise, rule.verified) == ("softmax", False, True)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_biased_choice_is_not_verified(score: str) -> None:
    rule = find_rule(*planted(score, renormalise=True, scale=1.0, bias=0.005)).rule
    assert not rule.verified
    assert 0 < rule.agreement < 1


def test_weights_of_another_kind_are_not_verified() -> None:
    logits, ids, _ = planted("softmax", renormalise=True, scale=1.0)
    uneven = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2))
    assert find_rule(logits, ids, uneven).rule.agreement < 0.1


def test_swapped_weights_are_not_verified() -> None:
    logits, ids, weights = planted("softmax", renormalise=True, scale=1.0)
    assert not find_rule(logits, ids, weights.flip(-1)).rule.verified


@pytest.mark.parametrize("wrong", [0, 1, 5, 40])
def test_agreement_is_the_share_of_tokens_that_follow_the_rule(wrong: int) -> None:
    logits, ids, weights = planted("softmax", renormalise=False, scale=1.0)
    lightest = logits.topk(4, dim=-1, largest=False).indices
    ids[:wrong], weights[:wrong] = lightest[:wrong], logits.softmax(-1).gather(-1, lightest)[:wrong]
    rule = find_rule(logits, ids, weights).rule
    assert rule.agreement == pytest.approx(1 - wrong / 400)
    assert rule.verified == (wrong == 0)


def test_nan_weights_are_not_verified() -> None:
    logits, ids, weights = planted("softmax", renormalise=True, scale=1.0)
    weights[:, 0] = torch.nan
    assert not find_rule(logits, ids, weights).rule.verified
