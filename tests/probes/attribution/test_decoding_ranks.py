"""Predictions by rank of the only expert: against plain passes with the decision replaced by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import moescope as ms
from moescope.core.errors import InputError
from moescope.probes.attribution.decoding_ranks import rank_divergence


def _logits(module: Any, ids: list[int], rank: int | None) -> Any:
    """Next-token log-probabilities of a plain pass; with a rank, every layer's decision is that expert alone, weight 1."""
    for layer in module.model.layers if rank is not None else ():
        gate, plain = layer.mlp.gate, layer.mlp.experts.forward

        def forward(hidden: Any, chosen: Any, weights: Any, *, gate: Any = gate, plain: Any = plain) -> Any:
            logits = hidden.reshape(-1, hidden.shape[-1]) @ gate.weight.T
            only = logits.argsort(-1, descending=True)[:, rank - 1 : rank]
            return plain(hidden, only, torch.ones_like(weights[:, :1]))

        layer.mlp.experts.forward = forward
    with torch.no_grad():
        found = module(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    for layer in module.model.layers if rank is not None else ():
        del layer.mlp.experts.forward
    return found


def test_divergence_by_rank_equals_plain_passes(tiny_model: Callable[..., Any], token_ids: Callable[..., Any]) -> None:
    module, sequences = tiny_model("mixtral"), token_ids([5, 9, 7])
    frame = rank_divergence(
        ms.load(module), ms.Corpus.from_token_ids(sequences), ranks=(1, 2, 4), controls=2, draws=10
    ).df()
    tokens = sum(len(s) - 1 for s in sequences)
    for rank in (1, 2, 4):
        divergence = flips = loss = 0.0
        for ids in sequences:
            own, edited = _logits(module, ids, None), _logits(module, ids, rank)
            for place, following in enumerate(ids[1:]):
                divergence += float((own[place].exp() * (own[place] - edited[place])).sum())
                flips += int(own[place].argmax() != edited[place].argmax())
                loss += float(own[place, following] - edited[place, following])
        found = frame[(frame["rank"] == rank) & (frame["label"] == "all")].set_index("metric")["value"]
        assert found["kl"] == pytest.approx(divergence / tokens, rel=1e-3)
        assert found["flips"] == pytest.approx(flips / tokens)
        assert found["delta_nll"] == pytest.approx(loss / tokens, abs=1e-4)


def test_labels_are_told_apart_and_the_trained_model_prefers_its_first_choice(demo_model: Any) -> None:
    texts = [{"text": "In the beginning God created the heaven.", "label": "verse"},
             {"text": "def add(a, b):\n    return a + b\n", "label": "code"}]  # fmt: skip
    result = rank_divergence(demo_model, texts, controls=2, draws=20)
    frame = result.df()
    assert set(frame["label"]) == {"all", "verse", "code"}
    assert set(frame["rank"]) == {1, 2, 3, 4}
    whole = frame[(frame["label"] == "all") & (frame["metric"] == "kl")].set_index("rank")
    assert whole["ci_high"][1] < min(whole["value"][2], whole["null"][1])
    assert (frame[frame["label"] != "all"].groupby("metric")["n"].sum() / 4 == whole["n"][1]).all()
    assert result.figure().data


@pytest.mark.parametrize("ranks", [(0,), (5,), (1, 1), ()])
def test_senseless_ranks_are_refused(tiny_model: Callable[..., Any], ranks: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="no ranks"):
        rank_divergence(ms.load(tiny_model("mixtral")), ms.Corpus.from_token_ids([[1, 2]]), ranks=ranks)


def test_a_dense_model_and_no_control_are_refused(tiny_model: Callable[..., Any]) -> None:
    corpus = ms.Corpus.from_token_ids([[1, 2]])
    with pytest.raises(InputError, match="no experts"):
        rank_divergence(ms.load(tiny_model("llama")), corpus)
    with pytest.raises(InputError, match="control"):
        rank_divergence(ms.load(tiny_model("mixtral")), corpus, controls=0)
