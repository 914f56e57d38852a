"""Calibrated means against means over plain forward passes, written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import moescope as ms
from moescope.core.edit_kinds.experts import Ablate
from moescope.core.edit_kinds.stream import SetChannel
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.probes.edits.session import edited
from moescope.probes.effects.calibration import channel_means, expert_means, with_means

LENGTHS = (9, 4, 12, 7, 1)


def plain_expert(experts: Any, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    """A gated expert, from its weights."""
    gate, up = (hidden @ experts.gate_up_proj[expert].T).chunk(2, -1)
    return (torch.nn.functional.silu(gate) * up) @ experts.down_proj[expert].T


@pytest.mark.parametrize("batch_size", [1, 3])
def test_expert_means_equal_those_of_the_tokens_that_chose_them(
    tiny_model: Callable[..., Any], token_ids: Any, plain_passes: Any, batch_size: int
) -> None:
    module, texts = tiny_model("qwen3_moe"), token_ids(LENGTHS)
    found = expert_means(
        ms.load(module), ms.Corpus.from_token_ids(texts), {1: [5, 0, 3], 0: [2]}, batch_size=batch_size
    )
    assert [(m.layer, m.expert) for m in found] == [(1, 5), (1, 0), (1, 3), (0, 2)]
    for mean in found:
        outs = []
        for batch in plain_passes(module, texts):
            hidden, ids, _, _ = batch.experts[mean.layer]
            real = batch.mask.reshape(-1).tolist()
            chose = [t for t in range(len(ids)) if real[t] and mean.expert in ids[t].tolist()]
            experts = module.model.layers[mean.layer].mlp.experts
            outs += [plain_expert(experts, mean.expert, hidden[t]) for t in chose]
        assert mean.n == len(outs) > 0
        torch.testing.assert_close(torch.tensor(mean.mean), torch.stack(outs).mean(0), atol=1e-5, rtol=1e-5)


def test_an_expert_that_no_token_chose_has_no_mean(tiny_model: Callable[..., Any]) -> None:
    module = tiny_model("qwen3_moe")
    with torch.no_grad():
        module.model.layers[0].mlp.gate.weight.zero_()  # ties: the first experts are chosen
    with pytest.raises(InputError, match=r"expert 7 of layer 0"):
        expert_means(ms.load(module), ms.Corpus.from_token_ids([[5, 6, 7]]), {0: [7]})


def test_with_means_fills_what_is_left_out_and_nothing_else(tiny_model: Callable[..., Any], token_ids: Any) -> None:
    live, corpus = ms.load(tiny_model("qwen3_moe")), ms.Corpus.from_token_ids(token_ids((40, 30, 50)))
    cut = Intervention(
        [SetChannel(layer=0, channels=1), Ablate(experts=[1, 4], how="mean"), Ablate(layer=1, experts=2)], name="cut"
    )
    found = with_means(live, corpus, cut)
    assert found.name == "cut"
    assert [(e.kind, e.layer) for e in found.edits] == [("set_channel", 0), ("ablate", 0), ("ablate", 1), ("ablate", 1)]
    wanted = {(m.layer, m.expert): m.mean for m in expert_means(live, corpus, {0: [1, 4], 1: [1, 4]})}
    for edit in found.edits[1:3]:
        assert isinstance(edit, Ablate)
        assert edit.means == tuple(wanted[edit.layer, e] for e in (1, 4))  # type: ignore[index]  # one layer
    with edited(live, found):  # the engine takes it
        live.module(input_ids=torch.tensor([[5, 6, 7]]))
    whole = Intervention([Ablate(layer=1, experts=2)])
    assert with_means(live, corpus, whole) is whole


@pytest.mark.parametrize("above", [None, 0.8])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_channel_means_of_starting_and_other_tokens(
    tiny_model: Callable[..., Any], token_ids: Any, plain_passes: Any, batch_size: int, above: float | None
) -> None:
    module, texts = tiny_model("llama"), token_ids(LENGTHS)
    corpus, channels = ms.Corpus.from_token_ids(texts), (7, 0, 31)
    found = channel_means(ms.load(module), corpus, layer=0, channels=channels, above=above, batch_size=batch_size)
    for place, channel in enumerate(channels):
        starting, others = [], []
        for batch in plain_passes(module, texts, 1):
            values = batch.resid[0][0, :, channel].tolist()
            starting += [x for x in values[:1] if above is None or abs(x) > above]
            others += [x for x in values[1:] if above is None or abs(x) > above]
        assert found.n_starting[place] == len(starting)
        assert found.n_others[place] == len(others)
        assert found.starting[place] == (pytest.approx(sum(starting) / len(starting), abs=1e-5) if starting else None)
        assert found.others[place] == pytest.approx(sum(others) / len(others), abs=1e-5)


def test_the_edits_set_channels_to_their_means(tiny_model: Callable[..., Any], token_ids: Any) -> None:
    live, texts = ms.load(tiny_model("llama")), token_ids(LENGTHS)
    means = channel_means(live, ms.Corpus.from_token_ids(texts), layer=0, channels=(3, 9))
    seen: list[torch.Tensor] = []
    with edited(live, Intervention(means.edits())), torch.no_grad():
        handle = live.module.model.layers[0].register_forward_hook(lambda _m, _i, out: seen.append(out))
        live.module(input_ids=torch.tensor(texts[2:3]))
        handle.remove()
    assert seen[0][0, 0, [3, 9]].tolist() == pytest.approx(means.starting)
    assert seen[0][0, 5, [3, 9]].tolist() == pytest.approx(means.others)


def test_a_model_whose_channels_sit_at_their_means_keeps_its_logits(tiny_model: Callable[..., Any]) -> None:
    """A constant of 300 in one channel at the first token: set to its mean nothing changes, set to 0 much does."""
    live = ms.load(tiny_model("llama", num_hidden_layers=3))

    def plant(_module: Any, _inputs: Any, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[:, 0, 4] = 300.0
        return out

    handle = live.module.model.layers[0].register_forward_hook(plant)
    ids = torch.tensor([[3, 8, 5, 6]])
    try:
        means = channel_means(live, ms.Corpus.from_token_ids([[9, 8], [7, 6, 5]]), layer=0, channels=4, above=100.0)
        assert means.starting == (300.0,)
        assert means.others == (None,)
        with torch.no_grad():
            before = live.module(input_ids=ids).logits
    finally:
        handle.remove()

    def planted(edits: Any) -> torch.Tensor:
        with (
            edited(live, Intervention([SetChannel(layer=0, channels=4, values=(300.0,), positions="0:1"), *edits])),
            torch.no_grad(),
        ):
            found: torch.Tensor = live.module(input_ids=ids).logits
        return found

    assert torch.equal(planted(means.edits()), before)
    assert (planted([SetChannel(layer=0, channels=4, above=100.0)]) - before).abs().max() > 0.01


def test_bad_input(tiny_model: Callable[..., Any]) -> None:
    live, corpus = ms.load(tiny_model("qwen3_moe")), ms.Corpus.from_token_ids([[4, 5]])
    with pytest.raises(InputError, match="no such channel"):
        channel_means(live, corpus, layer=0, channels=32)
    with pytest.raises(InputError, match="layers 0 to 1"):
        channel_means(live, corpus, layer=2, channels=1)
    with pytest.raises(InputError, match="above"):
        channel_means(live, corpus, layer=0, channels=1, above=1e9)
    with pytest.raises(InputError):
        expert_means(ms.load(tiny_model("llama")), corpus, {0: [1]})


@pytest.mark.slow
def test_smollm2_needs_its_massive_activation_and_not_its_exact_value(smollm2: Any) -> None:
    texts = [
        "The river ran past the old mill.",
        "Water boils at one hundred degrees.",
        "She opened the letter and read it.",
    ]
    means = channel_means(smollm2, texts, layer=12, channels=507, above=100.0, max_length=32)
    assert means.n_starting == (3,)
    assert means.starting[0] is not None
    assert means.starting[0] > 20_000
    ids = torch.tensor(
        [smollm2.tokenizer("The quick brown fox jumps over the lazy dog, and then it sleeps.")["input_ids"]]
    )

    def nll(edits: Any) -> float:
        with edited(smollm2, Intervention(edits)), torch.no_grad():
            logits = smollm2.module(input_ids=ids).logits[0, :-1]
        return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))

    base = nll([])
    assert nll([SetChannel(layer=12, channels=507, above=100.0)]) > base + 2
    assert nll(means.edits()) == pytest.approx(base, abs=0.1)
