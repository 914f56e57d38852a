"""What the probes of experts store, against loops over tokens that multiply the experts' weights by hand."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import moescope as ms
from moescope.probes.families.tiny import build_tiny
from moescope.probes.recorders.experts import ExpertsProbe

BACKENDS = ("grouped_mm", "batched_mm", "eager")
LENGTHS = (7, 12, 3, 9, 5)
TOKENS = sum(LENGTHS)
# model type → settings under which neurons are zero, or clamped, often enough to tell
TYPES: dict[str, dict[str, Any]] = {
    "mixtral": {"hidden_act": "relu"},
    "qwen3_moe": {"hidden_act": "relu"},
    "olmoe": {"hidden_act": "relu"},
    "deepseek_v3": {"hidden_act": "silu"},
    "nemotron_h": {"mlp_hidden_act": "relu2"},
    "gpt_oss": {},
}
SEQUENCES = [[(7 * row + 3 * place) % 90 + 2 for place in range(length)] for row, length in enumerate(LENGTHS)]


@dataclass(frozen=True)
class Slot:
    """One token at one expert, by hand in float64."""

    token: int
    weight: float
    out: torch.Tensor
    neurons: torch.Tensor

    @property
    def norm(self) -> float:
        return math.sqrt(sum(x * x for x in self.out.tolist()))


def one_by_hand(held: Any, hidden: torch.Tensor, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and neurons of one expert for one token, from slices of its weights."""

    def times(x: torch.Tensor, name: str) -> torch.Tensor:
        weight = getattr(held, name)[expert].double()
        found = x @ (weight if held.is_transposed else weight.t())
        return found + getattr(held, f"{name}_bias")[expert].double() if held.has_bias else found

    x = hidden.double()
    neurons = held._apply_gate(times(x, "gate_up_proj")) if held.has_gate else held.act_fn(times(x, "up_proj"))
    return times(neurons, "down_proj"), neurons


def slots_by_hand(module: Any, batch_size: int) -> dict[tuple[int, int], list[Slot]]:
    """(layer, expert) → its slots, from what plain transformers hands to the experts, batch by batch."""
    found: dict[tuple[int, int], list[Slot]] = defaultdict(list)
    experts = {s.layer: module.get_submodule(s.experts_path) for s in ms.load(module).anatomy.moe}
    given: dict[int, Any] = {}

    def noting(layer: int) -> Callable[[Any, Any, Any], None]:
        return lambda _, args, kwargs: given.update({layer: (*args, *kwargs.values())})

    handles = [held.register_forward_pre_hook(noting(layer), with_kwargs=True) for layer, held in experts.items()]
    token = 0
    for start in range(0, len(SEQUENCES), batch_size):
        rows = SEQUENCES[start : start + batch_size]
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        with torch.no_grad():
            module(input_ids=ids, attention_mask=mask, use_cache=False)
            for layer, (hidden, chosen, weights) in given.items():
                number = token
                for place in mask.flatten().nonzero().flatten().tolist():
                    for expert, weight in zip(chosen[place].tolist(), weights[place].tolist(), strict=True):
                        out, neurons = one_by_hand(experts[layer], hidden.reshape(-1, hidden.shape[-1])[place], expert)
                        found[layer, expert].append(Slot(number, weight, out, neurons))
                    number += 1
        token += int(mask.sum())
    for handle in handles:
        handle.remove()
    return found


def made(model_type: str, dtype: str, backend: str) -> Any:
    module: Any = build_tiny(model_type, dtype=getattr(torch, dtype), **TYPES[model_type])
    module.set_experts_implementation(backend)
    return module


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", TYPES)
def test_every_column_of_experts_is_what_a_loop_over_tokens_finds(
    model_type: str, dtype: str, backend: str, record_ids: Callable[..., Any]
) -> None:
    near = {"float32": 1e-4, "bfloat16": 4e-2}[dtype]
    run = record_ids(made(model_type, dtype, backend), SEQUENCES, batch_size=2)
    assert run.status == "complete"
    by_hand = slots_by_hand(made(model_type, dtype, backend), 2)
    rows = run.store.fetch(
        """
        SELECT layer, expert, tokens, weight_sum, output_norm_mean, weighted_norm_sum, max_abs_out, max_abs_channel,
            max_abs_token, active_share, zero_share
        FROM experts WHERE run_id = ? AND expert >= 0
        """,
        [run.run_id],
    )
    assert {row[:2] for row in rows} >= set(by_hand)
    zero_shares = []
    for layer, expert, tokens, *found in rows:
        slots = by_hand[layer, expert]
        assert tokens == len(slots)
        if not slots:
            assert found == [0.0, None, 0.0, None, None, None, None, None]
            continue
        sums, (largest, channel, token, active, zero) = found[:3], found[3:]
        assert sums == pytest.approx(
            [
                sum(slot.weight for slot in slots),
                sum(slot.norm for slot in slots) / tokens,
                sum(slot.weight * slot.norm for slot in slots),
            ],
            rel=near,
        )
        maxima = {slot.token: slot.out.abs() for slot in slots}
        assert largest == pytest.approx(max(float(out.max()) for out in maxima.values()), rel=near)
        assert float(maxima[token][channel]) == pytest.approx(largest, rel=near)
        neurons = torch.stack([slot.neurons for slot in slots])
        share = float((neurons == 0).double().mean())
        # A neuron next to zero may fall on either side of it in a narrow type.
        assert zero == pytest.approx(share, abs=1e-9 if dtype == "float32" else 0.02)
        assert active == pytest.approx(1 - share, abs=1e-9 if dtype == "float32" else 0.02)
        assert active + zero == pytest.approx(1)
        zero_shares.append(zero)
    relu = any("relu" in str(value) for value in TYPES[model_type].values())
    assert (sum(zero_shares) / len(zero_shares) > 0.2) == relu, "the neurons of these models must tell something"


@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss"])
def test_the_threshold_of_activity_is_the_users(
    model_type: str, record_ids: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    threshold = 0.05
    monkeypatch.setitem(ExpertsProbe.__init__.__kwdefaults__, "threshold", threshold)
    run = record_ids(made(model_type, "float32", "grouped_mm"), SEQUENCES, batch_size=2)
    by_hand = slots_by_hand(made(model_type, "float32", "grouped_mm"), 2)
    shares = run.store.fetch("SELECT layer, expert, active_share, zero_share FROM experts WHERE tokens > 0")
    assert len(shares) == len(by_hand)
    for layer, expert, active, zero in shares:
        neurons = torch.stack([slot.neurons for slot in by_hand[layer, expert]]).abs()
        assert active == pytest.approx(float((neurons > threshold).double().mean()), abs=1e-9)
        assert zero == pytest.approx(float((neurons == 0).double().mean()), abs=1e-9)
    assert any(0 < active < 1 - zero for _, _, active, zero in shares)


def test_activity_is_null_where_neurons_cannot_be_seen(record_ids: Callable[..., Any]) -> None:
    """An implementation of somebody else's shows what it puts out, and not its neurons: null, never zero, and said."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

    def own(self: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return 1.0 * grouped_mm_experts_forward(self, hidden, ids, weights)

    module = made("olmoe", "float32", "grouped_mm")
    known = record_ids(module, SEQUENCES, name="known")
    ALL_EXPERTS_FUNCTIONS.register("somebody_elses", own)
    try:
        module.config._experts_implementation = "somebody_elses"
        run = record_ids(module, SEQUENCES, name="closed")
    finally:
        del ALL_EXPERTS_FUNCTIONS._global_mapping["somebody_elses"]
    query = "SELECT layer, expert, tokens, output_norm_mean FROM experts WHERE run_id = ? ORDER BY ALL"
    closed, opened = (r.store.fetch(query, [r.run_id]) for r in (run, known))
    for a, b in zip(closed, opened, strict=True):
        assert a[:3] == b[:3]
        assert a[3] == (None if b[3] is None else pytest.approx(b[3], rel=1e-5))
    shares = run.store.fetch("SELECT active_share, zero_share FROM experts WHERE run_id = ?", [run.run_id])
    assert set(shares) == {(None, None)}
    assert run.status == "incomplete"
    missing = {row["site"] for row in run.coverage.table.to_pylist() if row["status"] != "complete"}
    assert missing == {f"blocks.{layer}.mlp.experts.hook_post" for layer in {row[0] for row in closed}}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model_type", ["olmoe", "deepseek_v3", "gpt_oss"])
def test_norms_of_slots_stand_beside_the_experts_that_routing_stores(
    model_type: str, backend: str, record_ids: Callable[..., Any]
) -> None:
    run = record_ids(
        made(model_type, "float32", backend), SEQUENCES, batch_size=2, probes=("routing", "expert_outputs")
    )
    assert run.status == "complete"
    norm_of = {
        (layer, slot.token, expert): slot.norm
        for (layer, expert), slots in slots_by_hand(made(model_type, "float32", backend), 2).items()
        for slot in slots
    }
    rows = run.store.fetch(
        """
        SELECT layer, token, experts, weights, norms
        FROM routing JOIN expert_outputs USING (run_id, layer, block, token)
        WHERE run_id = ?
        """,
        [run.run_id],
    )
    assert len(rows) == run.rows("expert_outputs") == run.rows("routing") == len({row[:2] for row in rows})
    stored = {(layer, token, e): n for layer, token, es, _, ns in rows for e, n in zip(es, ns, strict=True)}
    assert stored == pytest.approx(norm_of, rel=1e-4)
    assert all(list(weights) == sorted(weights, reverse=True) for _, _, _, weights, _ in rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", ["olmoe", "deepseek_v3", "gpt_oss"])
def test_router_logits_are_the_products_of_router_and_token(
    model_type: str, dtype: str, record_ids: Callable[..., Any]
) -> None:
    module = made(model_type, dtype, "grouped_mm")
    run = record_ids(module, SEQUENCES, batch_size=1, probes=("router_logits",))
    assert run.status == "complete"
    rows = run.store.fetch("SELECT layer, token, logits FROM router_logits WHERE run_id = ?", [run.run_id])
    found = {(layer, token): torch.tensor(logits) for layer, token, logits in rows}
    routers = {s.layer: module.get_submodule(s.logits_path) for s in ms.load(module).anatomy.moe}
    given: dict[int, torch.Tensor] = {}
    handles = [
        router.register_forward_pre_hook(lambda _, args, layer=layer: given.update({layer: args[0]}))
        for layer, router in routers.items()
    ]
    token = 0
    for row in SEQUENCES:
        with torch.no_grad():
            module(input_ids=torch.tensor([row]), use_cache=False)
        for layer, hidden in given.items():
            held = routers[layer]
            logits = hidden.reshape(-1, hidden.shape[-1]).double() @ held.weight.double().t()
            logits = logits + held.bias.double() if getattr(held, "bias", None) is not None else logits
            for place in range(len(row)):
                close = {"rtol": 2e-2, "atol": 2e-2} if dtype == "bfloat16" else {"rtol": 1e-5, "atol": 1e-5}
                torch.testing.assert_close(found.pop((layer, token + place)).double(), logits[place], **close)
        token += len(row)
    for handle in handles:
        handle.remove()
    assert not found
