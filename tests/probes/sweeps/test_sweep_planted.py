"""A model of which one expert alone knows a class of tokens: the sweep finds it, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import moescope as ms
from moescope.sweep_api import sweep

LAYER, EXPERT = 1, 5
KNOWN, ANSWER = range(1, 9), 96  # after each of these tokens comes the answer


@pytest.fixture
def taught(tiny_model: Callable[..., Any]) -> Any:
    """Tokens of the class lie along channel 0, others along channel 1 and a few more; expert 5 of layer 1 is chosen for channel 0
    and turns it into channel 2, which the head reads as the answer. Attention and all other experts put out nothing."""
    module = tiny_model("qwen3_moe", num_hidden_layers=3)
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        embeddings = module.model.embed_tokens.weight
        embeddings.zero_()
        embeddings[:, 8:] = 0.2 * torch.randn(97, 24, generator=random)
        embeddings[:, 1] = 1.0
        for token in KNOWN:
            embeddings[token, :2] = torch.tensor([3.0, 0.0])
        for number, block in enumerate(module.model.layers):
            block.self_attn.o_proj.weight.zero_()
            block.mlp.experts.down_proj.zero_()
            if number == LAYER:
                block.mlp.gate.weight[EXPERT] = 0
                block.mlp.gate.weight[EXPERT, 0], block.mlp.gate.weight[EXPERT, 1] = 5.0, -5.0
                block.mlp.experts.gate_up_proj[EXPERT].zero_()
                block.mlp.experts.gate_up_proj[EXPERT, :, 0] = 1.0
                block.mlp.experts.down_proj[EXPERT, 2] = 0.05
        module.lm_head.weight.zero_()
        module.lm_head.weight[ANSWER, 2] = 3.0
    return module


@pytest.fixture
def corpus() -> Any:
    random = np.random.default_rng(0)
    texts = []
    for _ in range(24):
        row: list[int] = []
        while len(row) < 20:
            other = random.integers(10, 90, 3).tolist()
            row += [int(random.choice(KNOWN)), ANSWER] if random.random() < 0.5 else other
        texts.append(row)
    return ms.Corpus.from_token_ids(texts)


def test_sweep_ranks_the_expert_that_knows_first(taught: Any, corpus: Any, store: Any) -> None:
    frame = sweep(ms.load(taught), corpus, store, progress=False).df()
    main = frame[frame["metric"] == "ΔNLL"].sort_values("rank")
    first, others = main.iloc[0], main.iloc[1:]
    assert (first["layer"], first["expert"]) == (LAYER, EXPERT)
    assert first["ci_low"] > 0.3
    assert first["q"] < 1e-4
    assert first["null"] == pytest.approx(0, abs=1e-6)
    assert others["value"].abs().max() < 1e-6
    assert (others["ci_low"] <= 0).all()
    assert (others["ci_high"] >= 0).all()
    over = frame[frame["metric"] == "ΔNLL over the others"].set_index(["layer", "expert"])
    assert over.loc[(LAYER, EXPERT), "ci_low"] > 0.3
    assert over["ci_low"].gt(0).sum() == 1


def test_screening_ranks_it_first_too_and_confirms_it(taught: Any, corpus: Any, store: Any) -> None:
    frame = sweep(ms.load(taught), corpus, store, screen=1, verify=5, progress=False).df()
    estimates = frame[frame["metric"] == "ΔNLL estimate"]
    top = estimates.loc[estimates["value"].idxmax()]
    assert (top["layer"], top["expert"]) == (LAYER, EXPERT)
    run = frame[(frame["metric"] == "ΔNLL") & ~frame["drawn"].fillna(value=True).astype(bool)]
    assert run[["layer", "expert"]].to_numpy().tolist() == [[LAYER, EXPERT]]
    assert run["value"].iloc[0] > 0.3


def test_dropping_by_a_score_that_knows_it_spares_the_model(taught: Any, corpus: Any, store: Any) -> None:
    model = ms.load(taught)
    worth = {(layer, expert): float((layer, expert) == (LAYER, EXPERT)) for layer in range(3) for expert in range(8)}
    found = sweep(
        model, corpus, store, kind="drop", how="zero", scores=worth, shares=[0.25, 0.5], controls=8, progress=False
    )
    frame = found.df()
    curve = frame[frame["metric"] == "ΔNLL"]
    assert curve["share"].tolist() == [0.25, 0.5]
    assert curve["value"].abs().max() < 1e-6
    assert (curve["null"] > 0.05).all()  # a quarter and half of the random sets hold the expert
    against = sweep(
        model,
        corpus,
        store,
        kind="drop",
        how="zero",
        scores=worth,
        shares=[0.25],
        controls=8,
        highest=True,
        progress=False,
    ).df()
    over = against[against["metric"] == "ΔNLL over random"].iloc[0]
    assert over["ci_low"] > 0


def test_routing_is_worth_what_the_expert_knows_in_its_layer_only(taught: Any, corpus: Any, store: Any) -> None:
    frame = (
        sweep(ms.load(taught), corpus, store, kind="routing_value", controls=5, progress=False).df().set_index("place")
    )
    assert frame.loc["L1", "ci_low"] > 0.1
    for label in ("L0", "L2"):
        assert frame.loc[label, "value"] == pytest.approx(0, abs=1e-6)
    assert frame.loc["all layers", "value"] == pytest.approx(frame.loc["L1", "value"], rel=0.5)
