"""Models in which one expert was made a super expert by hand: found in the records, with the massive activation it writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moescope.analysis_api import analyze
from moescope.store.run import Run

LAYERS, CHANNEL = 4, 11
LENGTHS = (10, 9)


def make_super(module: Any, batch: Any, layer: int, place: tuple[int, int], *, earlier: bool) -> int:
    """Let one expert answer one token with 10⁵ and more in one channel, and all others as before; gives the expert.

    One of its neurons is set to fire for that token alone: its weights solve v · h = 1 there and v · h = 0 for every other token
    of the batch. Its place in the down projection is then scaled by 10³.
    """
    import torch

    hidden, ids, _, _ = batch.experts[layer]
    real = batch.mask.flatten()
    at = place[0] * batch.ids.shape[1] + place[1]
    chosen = ids[at].tolist()
    if earlier:  # a token before it takes the same expert, and is not answered so
        before = set(ids[:at][real[:at]].flatten().tolist())
        chosen = [expert for expert in chosen if expert in before]
    expert = int(chosen[0])
    targets = torch.zeros(len(hidden), dtype=torch.float64)
    targets[at] = 1.0
    vector = (torch.linalg.pinv(hidden[real].double()) @ targets[real]).float()
    experts = module.model.layers[layer].mlp.experts
    width = experts.down_proj.shape[-1]
    with torch.no_grad():
        experts.gate_up_proj[expert, 0] = 30 * vector
        experts.gate_up_proj[expert, width] = 30 * vector
        experts.down_proj[expert, :, 0] = 0.0
        experts.down_proj[expert, CHANNEL, 0] = 1.0
        experts.down_proj[expert, CHANNEL, 0] *= 1e3
    return expert


@pytest.fixture
def record_super(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], plain_passes: Callable[..., Any], record_ids: Callable[..., Any],
    request: pytest.FixtureRequest,
) -> Callable[..., tuple[Run, int, Any, Any]]:  # fmt: skip
    """`record_super(layer, place, earlier=…)`: the run, the expert, the model and its plain batch before the change."""

    def make(layer: int, place: tuple[int, int], *, earlier: bool = False) -> tuple[Run, int, Any, Any]:
        module = tiny_model("olmoe", num_hidden_layers=LAYERS, num_experts=16)
        sequences = token_ids(LENGTHS, seed=4)
        (batch,) = plain_passes(module, sequences)
        expert = make_super(module, batch, layer, place, earlier=earlier)
        run = record_ids(module, sequences, name=request.node.name)
        assert run.status == "complete"
        return run, expert, module, batch

    return make


def named_by(run: Run, rule: str) -> set[tuple[int, int]]:
    frame = analyze(run, "super_experts").df()
    found = frame[(frame["rule"] == rule) & (frame["round"] == 0) & frame["super_expert"].fillna(False).astype(bool)]
    return set(zip(found["layer"], found["expert"], strict=True))


def massive(run: Run) -> set[tuple[int, int, int]]:
    return set(run.store.fetch("SELECT layer, token, channel FROM massive_activations WHERE run_id = ?", [run.run_id]))


def test_a_super_expert_on_the_first_token_is_found_with_the_massive_activation_it_writes(record_super: Any) -> None:
    run, expert, _, _ = record_super(1, (0, 0))
    for rule in ("paper", "released", "REAP"):
        assert named_by(run, rule) == {(1, expert)}
    row = analyze(run, "super_experts").df().query("super_expert").iloc[0]
    assert (row["token"], row["position"], row["channel"]) == (0, 0, CHANNEL)
    assert row["margin"] > 1
    assert massive(run) == {(layer, 0, CHANNEL) for layer in range(1, LAYERS)}
    result = analyze(run, "massive_activations")
    assert result.title.startswith("Massive activations form in block 1, on the first token of 1 of 2 texts")
    assert result.df().query("metric == 'max |x|'")["forms"].tolist() == [False, True, False, False]


def test_a_super_expert_of_the_last_quarter_is_one_by_the_paper_and_none_by_the_code(record_super: Any) -> None:
    run, expert, _, _ = record_super(3, (0, 0))
    assert named_by(run, "paper") == {(3, expert)}
    assert (3, expert) not in named_by(run, "released") | named_by(run, "REAP")
    assert massive(run) == {(3, 0, CHANNEL)}
    frame = analyze(run, "super_experts").df().query("rule == 'released' and round == 0")
    passed_over = frame[(frame["layer"] == 3) & (frame["expert"] == expert)]
    assert passed_over["fails"].tolist() == ["layer"]


def test_a_super_expert_on_token_five_is_found_where_its_first_token_tells_nothing(record_super: Any) -> None:
    """The released code reads the first row of each expert's output: here that of an earlier token, which is small."""
    import torch

    run, expert, module, batch = record_super(1, (0, 5), earlier=True)
    assert named_by(run, "released") == {(1, expert)}
    row = analyze(run, "super_experts").df().query("super_expert").iloc[0]
    assert (row["token"], row["position"], row["channel"]) == (5, 5, CHANNEL)
    assert massive(run) == {(layer, 5, CHANNEL) for layer in range(1, LAYERS)}
    hidden, ids, _, _ = batch.experts[1]
    first = next(place for place in range(len(ids)) if expert in ids[place].tolist())
    assert first < 5
    experts = module.model.layers[1].mlp.experts
    with torch.no_grad():
        gate, up = (experts.gate_up_proj[expert] @ hidden[first]).chunk(2)
        seen = (experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)).abs().max()
    others = run.store.fetch(
        "SELECT max_abs_out FROM experts WHERE run_id = ? AND layer < 3 AND max_abs_out IS NOT NULL", [run.run_id]
    )
    assert float(seen) < np.percentile([value for (value,) in others], 99.5), "the first row would not have named it"


def test_the_largest_of_a_plain_model_is_named_by_relative_rules_and_its_margin_says_how_little_that_is(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    """No massive activation, so none by the paper; the code's rule has no absolute size and names the largest expert."""
    run = record_ids(
        tiny_model("olmoe", num_hidden_layers=LAYERS, num_experts=16), token_ids(LENGTHS, seed=4), name="plain"
    )
    assert analyze(run, "massive_activations").title.startswith("No massive activation; the nearest is")
    assert named_by(run, "paper") == set()
    assert len(named_by(run, "released")) == 1
    frame = analyze(run, "super_experts").df()
    again = frame[
        (frame["rule"] == "released") & (frame["round"] == 1) & frame["super_expert"].fillna(False).astype(bool)
    ]
    assert len(again) == 1, "nor does the next one stand behind"
    assert float(frame.query("rule == 'released' and round == 0")["margin"].max()) < 2
