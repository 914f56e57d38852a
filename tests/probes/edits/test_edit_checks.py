"""Bad input: said before anything runs, with what is there, and with both edits where two contradict each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import moescope as ms
import moescope.edits as e
from moescope.core.errors import InputError
from moescope.probes.edits.checks import check_intervention
from moescope.probes.edits.session import edited
from moescope.probes.families.tiny import build_tiny


@pytest.fixture
def model(tiny_model: Callable[..., Any]) -> Any:
    return ms.load(tiny_model("qwen3_moe"))


@pytest.mark.parametrize(
    ("edits_", "said"),
    [
        ([e.Ablate(experts=[8])], "no expert 8"),
        ([e.Ablate(layer=0, experts=[3, 99])], "no expert 99.*0 to 7"),
        ([e.Ablate(layer=2, experts=[0])], "no layer 2.*0 to 1"),
        ([e.Add(layer=7, vector=[0.0] * 32)], "no layer 7"),
        ([e.Ablate(layer=0, experts=[0], block="mlp.1")], "no router 'mlp.1'"),
        ([e.SwapExperts(first=0, second=8)], "no expert 8"),
        ([e.TopK(k=9)], "cannot take 9 experts"),
        ([e.RankRouting(ranks=[9])], "rank 9"),
        ([e.MaskHead(heads=4)], "head"),
        ([e.Add(vector=[1.0] * 31)], "31"),
        ([e.SetChannel(channels=32)], "32"),
        ([e.MixRouting(reference=[0.5, 0.5])], "8 probabilities"),
        ([e.Ablate(experts=[0], how="mean")], "needs `means`"),
        ([e.Ablate(layer=0, experts=[0], how="mean", means=[[0.0] * 8])], "vectors of 32"),
        ([e.Ablate(experts=[0], how="mean", means=[[0.0] * 32])], "name one layer"),
        ([e.Ablate(layer=0, experts=range(8))], "all 8 experts of layer 0"),
        ([e.Ablate(experts=range(4)), e.Ablate(layer=1, experts=range(4, 8), how="route_around")], "all 8 .* layer 1"),
        ([e.Ablate(experts=range(7), how="route_around")], "1 experts left to choose from, and a token takes 2"),
        ([e.Keep(experts=[3])], "1 experts left"),
        ([e.Keep(experts=[3, 4, 5]), e.TopK(k=4)], "3 experts left.*takes 4"),
        ([e.Keep(experts=[3, 4]), e.Ablate(experts=[4], how="route_around")], "1 experts left"),
        ([e.Force(experts=[1, 2, 3])], "more experts of layer 0 are forced"),
        ([e.TopK(k=1, strength=0.5)], "strength 0 or 1"),
        ([e.Ablate(experts=[0], how="route_around", strength=0.5)], "strength 0 or 1"),
    ],
)
def test_what_is_not_there_is_refused(model: Any, edits_: list[e.Edit], said: str) -> None:
    with pytest.raises(InputError, match=f"(?s){said}"):
        check_intervention(model, e.Intervention(edits_))
    with pytest.raises(InputError, match=f"(?s){said}"), edited(model, e.Intervention(edits_)):
        pass


A1 = e.Ablate(experts=[1], how="route_around")
CONFLICTS: list[tuple[e.Edit, e.Edit]] = [
    (e.Force(experts=[1]), A1),
    (e.Force(layer=1, experts=[1, 2]), e.Ablate(experts=[2])),
    (e.Force(experts=[7]), e.Keep(experts=range(6))),
    (e.SetRouting(run="a"), e.SetRouting(run="b")),
    (e.SetRouting(run="a"), e.RandomRouting()),
    (e.RandomRouting(), A1),
    (e.RandomRouting(seed=1), e.RandomRouting(seed=2)),
    (e.SetRouting(run="a"), e.Bias(experts=0, value=1.0)),
    (e.TopK(k=1), e.TopK(k=3)),
    (e.TopK(k=1), e.RankRouting()),
    (e.Keep(experts=range(4)), e.Keep(experts=range(4, 8))),
    (e.Skip(layer=1, part="mlp"), A1),
    (e.Skip(layer=1), e.MaskHead(layer=[0, 1], heads=0)),
    (e.Skip(layer=1, part="attn"), e.Add(layer=1, vector=(0.0,) * 32, site="hook_attn_out")),
    (e.MaskHead(heads=[0, 1]), e.MaskHead(heads=1, how="uniform")),
]


@pytest.mark.parametrize("pair", CONFLICTS, ids=lambda pair: f"{pair[0].kind}-{pair[1].kind}")
@pytest.mark.parametrize("turned", [False, True])
def test_contradictions_name_both_edits(
    model: Any, record_ids: Callable[..., Any], pair: tuple[e.Edit, e.Edit], turned: bool
) -> None:
    replayed = [edit.run for edit in pair if isinstance(edit, e.SetRouting)]
    runs = {name: record_ids(model.module, [[5, 6, 7]], name=name) for name in replayed}
    one, other = reversed(pair) if turned else pair
    with pytest.raises(InputError) as refused:
        check_intervention(model, e.Intervention([one, other]), sources=runs)
    assert repr(one) in str(refused.value)
    assert repr(other) in str(refused.value)


def test_edits_that_never_meet_do_not_contradict_each_other(model: Any) -> None:
    for one, other in [
        (e.Force(experts=[1], positions="prompt"), e.Ablate(experts=[1], positions="generated")),
        (e.Force(experts=[1], layer=0), e.Ablate(experts=[1], layer=1)),
        (e.Force(experts=[1], positions="0:4"), e.Ablate(experts=[1], positions="4:")),
        (e.TopK(k=1, positions="token:3"), e.TopK(k=3, positions="token:4")),
        (e.Force(experts=[1]), e.Ablate(experts=[1], strength=0)),
        (e.Force(experts=[1]), e.Ablate(experts=[2])),
        (e.Skip(layer=1, part="attn"), A1),
        (e.Skip(layer=1, part="mlp"), e.Ablate(layer=0, experts=[1])),
        (e.MaskHead(heads=0), e.MaskHead(heads=1, how="uniform")),
    ]:
        check_intervention(model, e.Intervention([one, other]))


def test_an_intervention_for_another_model_is_refused(model: Any, tiny_model: Callable[..., Any]) -> None:
    other = ms.load(tiny_model("qwen3_moe", num_experts=6))
    cut = e.Intervention([e.Ablate(experts=[1])]).for_model(other.anatomy)
    with pytest.raises(InputError, match=f"another model.*{model.anatomy.digest}.*{other.anatomy.digest}"):
        check_intervention(model, cut)
    check_intervention(other, e.Intervention.from_json(cut.to_json()))
    same_make = ms.load(tiny_model("qwen3_moe", seed=1, dtype="bfloat16"))
    check_intervention(same_make, e.Intervention(cut.edits).for_model(model.anatomy))


def test_digests_tell_models_apart_and_last(tiny_model: Callable[..., Any], demo_model: Any) -> None:
    families = ["qwen3_moe", "olmoe", "mixtral", "deepseek_v3", "llama", "gpt2"]
    digests = [ms.load(tiny_model(f)).anatomy.digest for f in families]
    digests += [ms.load(tiny_model("qwen3_moe", **{k: v})).anatomy.digest for k, v in CHANGED.items()]
    assert len(set(digests)) == len(digests)
    assert ms.load(tiny_model("qwen3_moe", seed=9)).anatomy.digest == digests[0]
    # The same in every process: interventions are saved with it. It changes only with what the demo model is made of.
    assert demo_model.anatomy.digest == ms.load("demo").anatomy.digest


CHANGED = {"num_hidden_layers": 3, "num_experts_per_tok": 3, "hidden_size": 64, "vocab_size": 98}


def test_a_dense_model_has_no_experts_to_edit(tiny_model: Callable[..., Any]) -> None:
    model = ms.load(tiny_model("llama"))
    for edit in (e.Ablate(experts=0), e.TopK(k=1), e.FakeQuant(experts=0)):
        with pytest.raises(InputError, match="dense model"):
            check_intervention(model, e.Intervention([edit]))
    check_intervention(model, e.Intervention([e.Add(vector=[0.0] * 32), e.MaskHead(heads=0)]))


@pytest.mark.parametrize(
    ("family", "edit", "said"),
    [
        ("jetmoe", e.Ablate(experts=0), "sorted by expert"),
        ("doge", e.Scale(experts=0, factor=2.0), "looked up in two embeddings"),
        ("switch_transformers", e.Ablate(experts=0), "encoder-decoder"),
        ("llama4_text", e.Ablate(experts=0, how="copy"), "multiply the experts' inputs"),
        ("phimoe", e.TopK(k=1), "sparsemixer"),
        ("inkling_text", e.Ablate(experts=0, how="route_around"), "no known rule reproduces"),
        ("deepseek_v4", e.Keep(layer=0, experts=range(4)), "table of token ids"),
    ],
)
def test_families_that_cannot_take_an_edit_say_why(family: str, edit: e.Edit, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_intervention(ms.load(build_tiny(family)), e.Intervention([edit]))


def test_a_layer_of_ones_own_can_be_read_and_not_edited(tiny_model: Callable[..., Any]) -> None:
    class OwnMoe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(32, 4)
            self.last = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weights, ids = self.router(x.reshape(-1, 32)).topk(1)
            self.last = ids, weights
            return x

    module = tiny_model("llama")
    for layer in module.model.layers:
        layer.mlp = OwnMoe()
    ms.register_moe(OwnMoe, lambda moe, _inputs, _output: moe.last, n_experts=4, top_k=1, router="router")
    with pytest.raises(InputError, match="register_moe says how its decision is read"):
        check_intervention(ms.load(module), e.Intervention([e.Ablate(experts=0)]))
