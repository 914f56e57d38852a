"""The chain in models where every link was planted: cutting the writer takes the massive activation away, controls do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import moescope as ms
from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.phenomena_api import phenomena, write_rules
from moescope.probes.batches import BatchPlan
from moescope.probes.corpus import Corpus
from moescope.probes.edits.session import edited
from moescope.probes.phenomena.chain import chosen_batches, cut_links, passes_of
from moescope.probes.phenomena.chain_cuts import WRITER, Cut, expert_cut, neurons_at_zero
from moescope.probes.phenomena.massive import massive_places
from moescope.probes.phenomena.super_experts import pruned
from moescope.store.run import Run
from moescope.store.store import Store

LAYERS, CHANNEL, FIRST = 4, 11, 3
LENGTHS = (6, 5, 6, 5, 6, 4)  # fewer different tokens than channels, so that a neuron can tell first ones exactly


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    random = np.random.default_rng(4)
    return [[FIRST, *random.integers(10, 97, n - 1).tolist()] for n in LENGTHS]


@pytest.fixture
def planted_expert(
    tiny_model: Callable[..., Any], plain_passes: Callable[..., Any], sequences: list[list[int]]
) -> Callable[[int], tuple[Any, int]]:
    """`planted_expert(layer)`: a model in which one expert answers first tokens with 10⁴ and more in one channel."""

    def make(layer: int) -> tuple[Any, int]:
        module = tiny_model("olmoe", num_hidden_layers=LAYERS, num_experts=16)
        (batch,) = plain_passes(module, sequences)
        hidden, ids, _, _ = batch.experts[layer]
        real = batch.mask.flatten()
        first = torch.zeros_like(batch.mask)
        first[:, 0] = True
        expert = int(ids[0, 0])
        vector = (torch.linalg.pinv(hidden[real].double()) @ first.flatten()[real].double()).float()
        experts = module.model.layers[layer].mlp.experts
        width = experts.down_proj.shape[-1]
        with torch.no_grad():
            experts.gate_up_proj[expert, 0] = 30 * vector
            experts.gate_up_proj[expert, width] = 30 * vector
            experts.down_proj[expert, :, 0] = 0.0
            experts.down_proj[expert, CHANNEL, 0] = 1e3
        return module, expert

    return make


def stored(store: Store, run: Run, metric: str, kind: str = "target") -> list[float]:
    query = """
        SELECT value FROM effects
        WHERE base_run_id = ? AND metric = ? AND kind = ? AND group_kind = 'all'
            AND starts_with(intervention->>'name', ?)
        ORDER BY draw
    """
    name = "chain, writer" if kind == "target" else ""
    return [value for (value,) in store.fetch(query, [run.run_id, metric, kind, name])]


def test_ablating_a_planted_super_expert_takes_the_massive_activation_away_and_controls_do_not(
    planted_expert: Any, sequences: list[list[int]], store: Store
) -> None:
    module, expert = planted_expert(1)
    result = phenomena(
        ms.load(module), Corpus.from_token_ids(sequences), store, texts=6, cut_texts=6, max_length=16, needles=False,
        generate=0, progress=False,
    )  # fmt: skip
    run = store.run("phenomena")
    rules = dict(store.fetch("SELECT rule, expert FROM super_experts WHERE run_id = ? AND layer = 1", [run.run_id]))
    assert rules["paper"] == rules["released"] == expert
    frame = result.df()
    node = frame[frame["node"] == "massive activation"].iloc[0]
    assert (node["layer"], node["channel"], node["position"]) == (1, CHANNEL, 0)
    assert node["what"] == "on first tokens"
    row = frame[(frame["node"] == "writer") & (frame["metric"] == "massive activation that remains")].iloc[0]
    assert row["cut"] == f"L1·E{expert}"
    assert row["value"] < 0.01
    assert row["null_low"] > 0.98, "no control touches it"
    controls = store.fetch(
        """
        SELECT count(DISTINCT draw), min(value) FROM effects
        WHERE base_run_id = ? AND kind = 'control' AND metric = 'massive_share' AND effect_id IN (
            SELECT effect_id FROM effects WHERE kind = 'target' AND starts_with(intervention->>'name', 'chain, writer')
        )
        """,
        [run.run_id],
    )
    assert controls[0][0] == 5
    assert f"Without L1·E{expert}, " in result.title
    assert result.has_figure
    assert len(result.figure().data)


def test_numbers_of_the_cut_are_those_of_a_model_whose_weights_were_zeroed(
    planted_expert: Any, sequences: list[list[int]], record_ids: Callable[..., Any]
) -> None:
    """Losses, largest activations and attention to first tokens, from two plain models."""
    module, expert = planted_expert(1)
    run = record_ids(module, sequences, batch_size=3)
    model, places = ms.load(module), massive_places(run)
    plan = BatchPlan(Corpus.from_token_ids(sequences), None, 3, 16, 97)
    batches, _ = chosen_batches(plan, texts=6, batch_size=3)
    cut = expert_cut(model, [(1, "mlp", expert)], None, draws=1, seed=0)
    (effect,), ((sums, _),) = cut_links(model, batches, [cut], places=places, heads=[])
    found = {(row.group_kind, row.group_value, row.metric): row.value for row in effect.target}
    before = [_by_hand(module, row) for row in sequences]
    with torch.no_grad():
        module.model.layers[1].mlp.experts.down_proj[expert] = 0.0
    after = [_by_hand(module, row) for row in sequences]
    tokens = sum(len(row) - 1 for row in sequences)
    delta = sum(a["nll"] - b["nll"] for a, b in zip(after, before, strict=True)) / tokens
    assert found["all", None, "base_nll"] == pytest.approx(sum(b["nll"] for b in before) / tokens, rel=1e-4)
    assert found["all", None, "delta_nll"] == pytest.approx(delta, rel=1e-3, abs=1e-5)
    kl = sum(float((b["p"].exp() * (b["p"] - a["p"])).sum()) for a, b in zip(after, before, strict=True))
    assert found["all", None, "kl"] == pytest.approx(kl / tokens, rel=1e-3)
    for layer in range(LAYERS):
        ratio = sum(a["largest"][layer] for a in after) / sum(b["largest"][layer] for b in before)
        assert found["layer", str(layer), "largest_share"] == pytest.approx(ratio, rel=1e-3)
        decay = sum(a["sink"][layer] for a in after) / sum(b["sink"][layer] for b in before)
        assert found["layer", str(layer), "sink_share"] == pytest.approx(decay, rel=1e-3)
    behind = [sum(sum(x["sink"][layer] for layer in (2, 3)) for x in part) for part in (after, before)]
    assert found["all", None, "sink_share"] == pytest.approx(behind[0] / behind[1], rel=1e-3)
    massive = [sum(sum(x["massive"][layer] for layer in places.layers) for x in part) for part in (after, before)]
    assert found["all", None, "massive_share"] == pytest.approx(massive[0] / massive[1], rel=1e-3, abs=1e-6)
    by_sequence = next(s for s in sums if s.metric == "delta_nll")
    order = {int(s): float(t) for s, t in zip(by_sequence.sequence, by_sequence.total, strict=True)}
    for number, (a, b) in enumerate(zip(after, before, strict=True)):
        assert order[number] == pytest.approx(a["nll"] - b["nll"], rel=1e-3, abs=1e-4)


def test_a_writer_in_the_last_quarter_is_cut_by_the_papers_rule(
    planted_expert: Any, sequences: list[list[int]], record_ids: Callable[..., Any]
) -> None:
    module, expert = planted_expert(3)
    run = record_ids(module, sequences)
    named = write_rules(run)
    assert named["paper"] == [(3, "mlp", expert)]
    assert (3, "mlp", expert) not in named["released"]
    rows = run.store.fetch("SELECT DISTINCT rule FROM super_experts WHERE layer = 3 AND run_id = ?", [run.run_id])
    assert ("released",) not in rows
    again = write_rules(run)
    assert again == named
    assert run.rows("super_experts") == sum(len(found) for found in named.values()), "written once, not twice"


def test_a_planted_neuron_is_cut_exactly_and_controls_leave_it(
    tiny_model: Callable[..., Any], sequences: list[list[int]], store: Store
) -> None:
    module = tiny_model("llama", num_hidden_layers=LAYERS)
    with torch.no_grad():
        ids = torch.tensor([[FIRST]])
        seen: list[torch.Tensor] = []
        handle = module.model.layers[1].mlp.register_forward_pre_hook(lambda _, i: seen.append(i[0][0, 0]))
        module(input_ids=ids, use_cache=False)
        handle.remove()
        direction = seen[0] / seen[0].norm() ** 2
        mlp = module.model.layers[1].mlp
        mlp.gate_proj.weight[5], mlp.up_proj.weight[5] = 30 * direction, 30 * direction
        mlp.down_proj.weight[:, 5] = 0.0
        mlp.down_proj.weight[CHANNEL, 5] = 1e3
    result = phenomena(
        ms.load(module), Corpus.from_token_ids(sequences), store, texts=6, cut_texts=6, max_length=16, needles=False,
        generate=0, progress=False,
    )  # fmt: skip
    frame = result.df()
    node = frame[frame["node"] == "massive activation"].iloc[0]
    assert (node["layer"], node["channel"], node["position"]) == (1, CHANNEL, 0)
    row = frame[(frame["node"] == "writer") & (frame["metric"] == "massive activation that remains")].iloc[0]
    assert row["cut"] == "L1·neuron 5"
    assert row["value"] < 0.01
    assert row["null_low"] > 0.98


def test_neurons_at_zero_are_columns_of_the_projection_at_zero_row_by_row(
    tiny_model: Callable[..., Any], sequences: list[list[int]]
) -> None:
    module = tiny_model("llama")
    model = ms.load(module)
    ids = torch.tensor([sequences[0][:5], sequences[1][:5], sequences[2][:5]])
    with torch.no_grad():
        plain = module(input_ids=ids, use_cache=False).logits
        with edited(model, [pruned_none(), neurons_at_zero(0, [3, 9])]) as session:
            session.assign([0, 1, 1])
            found = module(input_ids=ids, use_cache=False).logits
        assert torch.equal(module(input_ids=ids, use_cache=False).logits, plain), "outside nothing remains"
        module.model.layers[0].mlp.down_proj.weight[:, [3, 9]] = 0.0
        by_hand = module(input_ids=ids, use_cache=False).logits
    assert torch.equal(found[0], plain[0])
    torch.testing.assert_close(found[1:], by_hand[1:], rtol=1e-5, atol=1e-5)


def test_pruning_is_zeroing_the_down_projection(planted_expert: Any, sequences: list[list[int]]) -> None:
    module, expert = planted_expert(1)
    ids = torch.tensor([sequences[0]])
    with torch.no_grad(), edited(ms.load(module), pruned([(1, "mlp", expert)])):
        found = module(input_ids=ids, use_cache=False).logits
    with torch.no_grad():
        module.model.layers[1].mlp.experts.down_proj[expert] = 0.0
        by_hand = module(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, by_hand, rtol=1e-5, atol=1e-5)


def test_a_model_without_phenomena_is_told_so(
    tiny_model: Callable[..., Any], sequences: list[list[int]], store: Store
) -> None:
    result = phenomena(
        ms.load(tiny_model("llama")), Corpus.from_token_ids(sequences), store, texts=6, cut_texts=6, max_length=16,
        needles=False, generate=0, progress=False,
    )  # fmt: skip
    assert result.title.startswith("No massive activation: the largest |x| is")
    frame = result.df().set_index("node")
    assert frame.loc["writer", "what"] == "none found"
    assert frame.loc["massive activation", "what"] == "none found"
    shown = " ".join(a.text or "" for a in result.figure().layout.annotations)
    assert "none found" in shown


def test_bad_questions_are_refused(demo_model: Any, store: Store) -> None:
    texts = ["Some text here.", "And another one."]
    with pytest.raises(InputError, match="controls must be at least 1"):
        phenomena(demo_model, texts, store, controls=0, progress=False)
    with pytest.raises(InputError, match="leave out one of full_grid and trials"):
        phenomena(demo_model, texts, store, full_grid=True, trials=3, progress=False)
    with pytest.raises(InputError, match="full grid is one of needle trials"):
        phenomena(demo_model, texts, store, full_grid=True, needles=False, progress=False)
    store.begin_run(name="taken")
    with pytest.raises(InputError, match="already has a run called 'taken'"):
        phenomena(demo_model, texts, store, name="taken", progress=False)
    with pytest.raises(InputError, match="no expert to prune"):
        pruned([])
    with pytest.raises(InputError, match="shared expert"):
        pruned([(1, "mlp", -1)])


def test_passes_are_counted_before_they_are_made() -> None:
    cut = Cut(WRITER, pruned_none(), (pruned_none(), pruned_none()))
    assert passes_of([cut, cut]) == 7


def pruned_none() -> Any:
    from moescope.core.intervention import Intervention

    return Intervention()


def _by_hand(module: Any, row: list[int]) -> dict[str, Any]:
    """Losses, stream and eager attention of one sequence in a plain pass."""
    resid: dict[int, torch.Tensor] = {}
    handles = [
        block.register_forward_hook(
            lambda _, __, out, layer=layer: resid.update({layer: (out[0] if isinstance(out, tuple) else out)[0]})
        )
        for layer, block in enumerate(module.model.layers)
    ]
    before = module.config._attn_implementation
    module.set_attn_implementation("eager")
    with torch.no_grad():
        out = module(input_ids=torch.tensor([row]), use_cache=False, output_attentions=True)
    module.set_attn_implementation(before)
    for handle in handles:
        handle.remove()
    p = out.logits[0].double().log_softmax(-1)
    return {
        "nll": -sum(float(p[place, token]) for place, token in enumerate(row[1:])),
        "p": p[:-1],
        "largest": [float(resid[layer].abs().max()) for layer in range(LAYERS)],
        "massive": [abs(float(resid[layer][0, CHANNEL])) for layer in range(LAYERS)],
        "sink": [float(pattern[0, :, :, 0].double().sum()) for pattern in out.attentions],
    }


def test_a_run_without_cuts_shows_its_nodes_alone(
    planted_expert: Any, sequences: list[list[int]], record_ids: Callable[..., Any]
) -> None:
    module, _ = planted_expert(1)
    result = analyze(record_ids(module, sequences), "phenomena_chain", uncut=True)
    assert "no link of its chain was cut" in result.title
    assert math.isfinite(result.df()["value"].iloc[1])
    assert "not cut" in " ".join(a.text or "" for a in result.figure().layout.annotations)
