"""A module of one's own, of no library: announced in a line, recorded to the bit."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import moescope as ms

EXPERTS, TOP_K, WIDTH, VOCABULARY = 6, 2, 16, 40


class OwnMoE(nn.Module):
    """Top-2 of softmax; keeps its last decision."""

    def __init__(self) -> None:
        super().__init__()
        self.n_routed = EXPERTS
        self.choose = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.maps = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS)])

    def forward(self, x: Any) -> Any:
        shares = self.choose(x).softmax(-1)
        weights, ids = shares.topk(TOP_K, dim=-1)
        self.last = ids, weights
        every = torch.stack([expert(x) for expert in self.maps], -2)
        return (every.gather(-2, ids.unsqueeze(-1).expand(*ids.shape, WIDTH)) * weights.unsqueeze(-1)).sum(-2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.moe = nn.LayerNorm(WIDTH), OwnMoE()

    def forward(self, x: Any) -> Any:
        return x + self.moe(self.norm(x))


class OwnModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(logits=self.head(x))


@pytest.fixture
def announced() -> None:
    ms.register_moe(OwnMoE, lambda moe, inputs, output: moe.last, n_experts="n_routed", top_k=TOP_K, router="choose")


@pytest.fixture
def own_model() -> OwnModel:
    torch.manual_seed(0)
    return OwnModel().eval()


def test_a_layer_of_ones_own_is_recorded_to_the_bit(
    announced: None, own_model: OwnModel, record_ids: Callable[..., Any]
) -> None:
    sequences = [[1, 2, 3, 4, 5, 6, 7], [8, 9, 10], [11, 12, 13, 14, 15]]
    run = record_ids(own_model, sequences, batch_size=1, probes=["routing", "residual"])
    assert run.status == "complete"
    rows = run.store.fetch(
        "SELECT layer, experts, weights FROM routing WHERE run_id = ? ORDER BY layer, token", [run.run_id]
    )
    expected = []
    with torch.no_grad():
        decisions: list[list[Any]] = [[], [], []]
        for sequence in sequences:
            own_model(torch.tensor([sequence]))
            for layer, block in enumerate(own_model.blocks):
                ids, weights = block.moe.last
                decisions[layer] += zip(ids[0].tolist(), weights[0].tolist(), strict=True)
    for layer, found in enumerate(decisions):
        expected += [(layer, list(ids), list(weights)) for ids, weights in found]
    assert [(layer, list(ids), list(weights)) for layer, ids, weights in rows] == expected
    rules = run.store.fetch("SELECT routing_rule->>'text', routing_rule->>'verified' FROM layers WHERE kind = 'moe'")
    assert rules == [("top-k of softmax, weights softmax", "true")] * 3


def test_what_was_announced_shows_in_the_anatomy(announced: None, own_model: OwnModel) -> None:
    anatomy = ms.load(own_model).anatomy
    assert (anatomy.moe_layers, anatomy.n_experts, anatomy.top_k) == ([0, 1, 2], EXPERTS, TOP_K)
    assert (anatomy.d_model, anatomy.vocabulary) == (WIDTH, VOCABULARY)
    assert all("only the decision was announced" in str(s.unreachable) for s in anatomy.moe)


def test_the_inside_of_an_announced_layer_is_refused_with_the_reason(
    announced: None, own_model: OwnModel, record_ids: Callable[..., Any]
) -> None:
    with pytest.raises(ms.InputError, match=r"only the decision was announced"):
        record_ids(own_model, [[1, 2, 3]], probes=["routing", "experts"])


class Unannounced(OwnModel):
    """Its blocks hold experts that nothing says how to read."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(WIDTH), SomeMoE()) for _ in range(2)])


class SomeMoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.choose = nn.Linear(WIDTH, EXPERTS)

    def forward(self, x: Any) -> Any:
        return x


def test_an_unknown_module_is_refused_and_told_of_the_registration() -> None:
    with pytest.raises(ms.InputError, match="register_moe"):
        ms.load(Unannounced())


@pytest.mark.parametrize("wrong", [OwnMoE.__call__, "OwnMoE", 3])
def test_only_a_class_of_module_can_be_announced(wrong: Any) -> None:
    with pytest.raises(ms.InputError, match="takes a class of module"):
        ms.register_moe(wrong, lambda *_: None, n_experts=2, top_k=1)
