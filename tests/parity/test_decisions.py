"""Recorded decisions, loads and expert totals against what the experts were given, counted and multiplied by hand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

FAMILIES = ("qwen3_moe", "olmoe", "mixtral", "qwen2_moe", "deepseek_v3")
LENGTHS = (7, 1, 12, 4, 9)
LABELS = ["a", "b", "a", "c", "b"]


def real_tokens(batch: Any) -> list[tuple[int, int]]:
    """(run-wide token, row of the flattened batch) of every token that is not padding."""
    rows = batch.mask.reshape(-1).nonzero().flatten().tolist()
    return [(batch.first_token + n, row) for n, row in enumerate(rows)]


def decisions(batches: list[Any]) -> dict[tuple[int, int], list[tuple[float, int]]]:
    """(layer, token) → (weight, expert) pairs given to the experts, heaviest first, equal weights by lower id."""
    found = {}
    for batch in batches:
        for layer, (_, ids, weights, _) in batch.experts.items():
            for token, row in real_tokens(batch):
                pairs = zip(weights[row].float().tolist(), ids[row].tolist(), strict=True)
                found[layer, token] = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))
    return found


def stored_decisions(run: Any) -> dict[tuple[int, int], list[tuple[float, int]]]:
    rows = run.store.fetch("SELECT layer, token, weights, experts FROM routing WHERE run_id = ?", [run.run_id])
    stored = {(layer, token): list(zip(weights, experts, strict=True)) for layer, token, weights, experts in rows}
    assert len(stored) == len(rows), "a token was recorded twice"
    return stored


@pytest.mark.parametrize(
    ("family", "dtype", "experts"),
    [(family, "float32", None) for family in FAMILIES]
    + [("qwen3_moe", "bfloat16", None), ("olmoe", "bfloat16", "eager"), ("mixtral", "float32", "batched_mm")],
)
def test_recorded_decisions_are_those_the_experts_were_given(
    family: str,
    dtype: str,
    experts: str | None,
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
    plain_passes: Callable[..., Any],
) -> None:
    sequences = token_ids(LENGTHS)
    run = record_ids(tiny_model(family, dtype=dtype, experts=experts), sequences, batch_size=2)
    given = decisions(plain_passes(tiny_model(family, dtype=dtype, experts=experts), sequences, batch_size=2))
    assert run.status == "complete"
    assert {token for _, token in given} == set(range(sum(LENGTHS)))
    assert stored_decisions(run) == given


def test_equal_weights_are_stored_by_lower_id(
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
    plain_passes: Callable[..., Any],
) -> None:
    """A router of zero weights gives every expert 1/n; whatever order its top-k took, the store has one order."""
    module = tiny_model("olmoe")
    with torch.no_grad():
        module.model.layers[0].mlp.gate.weight.zero_()
        module.model.layers[1].mlp.gate.weight[4:].copy_(module.model.layers[1].mlp.gate.weight[:4])
    sequences = token_ids(LENGTHS)
    given = decisions(plain_passes(module, sequences))
    stored = stored_decisions(record_ids(module, sequences))
    assert stored == given
    assert all(weight == 0.125 for layer, token in stored if layer == 0 for weight, _ in stored[layer, token])
    for pairs in stored.values():
        assert all(w1 > w2 or (w1 == w2 and e1 < e2) for (w1, e1), (w2, e2) in pairwise(pairs))


def test_stored_slots_follow_weights_and_not_the_routers_order(
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A router that hands over its slots lightest first is stored heaviest first, ids beside their own weights."""
    module = tiny_model("olmoe")
    expected = stored_decisions(record_ids(module, token_ids(LENGTHS), name="as it is"))
    for layer in module.model.layers:
        plain = layer.mlp.gate.forward

        def backwards(hidden: Any, plain: Any = plain) -> Any:
            logits, weights, ids = plain(hidden)
            return logits, weights.flip(-1), ids.flip(-1)

        monkeypatch.setattr(layer.mlp.gate, "forward", backwards)
    reversed_run = stored_decisions(record_ids(module, token_ids(LENGTHS), name="backwards"))
    # The sums over slots round differently, so the second layer may differ in its last bits: the first is exact.
    assert {key: pairs for key, pairs in reversed_run.items() if key[0] == 0} == {
        key: pairs for key, pairs in expected.items() if key[0] == 0
    }


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_loads_equal_a_count_by_hand(
    family: str,
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
    plain_passes: Callable[..., Any],
) -> None:
    module, sequences = tiny_model(family), token_ids(LENGTHS)
    run = record_ids(module, sequences, batch_size=2, labels=LABELS)
    label_of = [label for label, length in zip(LABELS, LENGTHS, strict=True) for _ in range(length)]
    counts: dict[tuple[int, str, int], int] = defaultdict(int)
    sums: dict[tuple[int, str, int], float] = defaultdict(float)
    for (layer, token), pairs in decisions(plain_passes(module, sequences, batch_size=2)).items():
        for weight, expert in pairs:
            counts[layer, label_of[token], expert] += 1
            sums[layer, label_of[token], expert] += weight
    rows = run.store.fetch(
        "SELECT layer, label, expert, tokens, weight_sum FROM loads WHERE run_id = ? AND phase = 'prefill' AND block = 'mlp'",
        [run.run_id],
    )
    assert len(rows) == run.rows("loads") == len({row[:3] for row in rows})
    layers = sorted({layer for layer, _, _ in counts})
    every = {(layer, label, expert) for layer in layers for label in "abc" for expert in range(8)}
    assert {row[:3] for row in rows} == every, "an expert without load has its row too"
    for layer, label, expert, tokens, weight_sum in rows:
        assert tokens == counts[layer, label, expert]
        assert weight_sum == pytest.approx(sums[layer, label, expert], rel=1e-12)


@dataclass(frozen=True)
class Slot:
    """One expert's work on one row, by hand: its weight, L2 norm, largest |output|, that maximum's channel, and its output."""

    weight: float
    norm: float
    largest: float
    channel: int
    out: Any


def slots_by_hand(module: Any, batch: Any) -> Iterator[tuple[int, int, int, Slot]]:
    """(layer, expert, row, slot) of every slot, padding too: slices of `gate_up_proj` and `down_proj` in float64."""
    for layer, (hidden, ids, weights, _) in batch.experts.items():
        held = module.model.layers[layer].mlp.experts
        for row in range(len(ids)):
            for expert, weight in zip(ids[row].tolist(), weights[row].tolist(), strict=True):
                with torch.no_grad():
                    gate, up = (held.gate_up_proj[expert].double() @ hidden[row].double()).chunk(2)
                    out = held.down_proj[expert].double() @ (F.silu(gate) * up)
                channel = int(out.abs().argmax())
                yield layer, expert, row, Slot(weight, float(out.norm()), float(out[channel].abs()), channel, out)


@pytest.mark.parametrize("family", FAMILIES)
def test_expert_totals_equal_plain_products_of_the_weights(
    family: str,
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
    plain_passes: Callable[..., Any],
) -> None:
    module, sequences = tiny_model(family), token_ids(LENGTHS)
    run = record_ids(module, sequences, batch_size=2)
    seen: dict[tuple[int, int], list[tuple[int, Slot]]] = defaultdict(list)
    for batch in plain_passes(module, sequences, batch_size=2):
        token_of = {row: token for token, row in real_tokens(batch)}
        for layer, expert, row, slot in slots_by_hand(module, batch):
            if row in token_of:
                seen[layer, expert].append((token_of[row], slot))
    rows = run.store.fetch(
        """
        SELECT layer, expert, tokens, weight_sum, output_norm_mean, weighted_norm_sum,
            max_abs_out, max_abs_channel, max_abs_token
        FROM experts
        WHERE run_id = ? AND block = 'mlp' AND expert >= 0
        """,
        [run.run_id],
    )
    experts = module.model.layers[-1].mlp.experts.num_experts
    assert {row[:2] for row in rows} == {(layer, e) for layer in {key[0] for key in seen} for e in range(experts)}
    shared = run.store.fetch("SELECT count(*) FROM experts WHERE run_id = ? AND expert < 0", [run.run_id])[0][0]
    assert len(rows) + shared == run.rows("experts")
    for layer, expert, *found in rows:
        slots = [slot for _, slot in seen[layer, expert]]
        if not slots:
            assert found == [0, 0.0, None, 0.0, None, None, None]
            continue
        token, largest = max(seen[layer, expert], key=lambda pair: pair[1].largest)
        expected = [
            len(slots),
            sum(slot.weight for slot in slots),
            sum(slot.norm for slot in slots) / len(slots),
            sum(slot.weight * slot.norm for slot in slots),
            largest.largest,
        ]
        assert found[:5] == pytest.approx(expected, rel=1e-5)
        assert found[5:] == [largest.channel, token]


@pytest.mark.parametrize("family", FAMILIES)
def test_routed_output_is_the_weighted_sum_of_slot_outputs(
    family: str, tiny_model: Callable[..., Any], token_ids: Callable[..., Any], plain_passes: Callable[..., Any]
) -> None:
    """Holds of the untapped model; it is what makes `weights` × expert output the right decomposition."""
    module = tiny_model(family)
    (batch,) = plain_passes(module, token_ids(LENGTHS))
    totals = {layer: torch.zeros_like(routed, dtype=torch.float64) for layer, (*_, routed) in batch.experts.items()}
    for layer, _, row, slot in slots_by_hand(module, batch):
        totals[layer][row] += slot.weight * slot.out
    for layer, (*_, routed) in batch.experts.items():
        torch.testing.assert_close(totals[layer], routed.double(), rtol=1e-5, atol=1e-5)


def test_padding_never_wins_an_experts_maximum(
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
    plain_passes: Callable[..., Any],
) -> None:
    module, sequences = tiny_model("qwen3_moe"), token_ids((3, 20, 2))
    (batch,) = plain_passes(module, sequences)
    real: dict[tuple[int, int], float] = defaultdict(float)
    padding: dict[tuple[int, int], float] = defaultdict(float)
    rows = {row for _, row in real_tokens(batch)}
    for layer, expert, row, slot in slots_by_hand(module, batch):
        largest = real if row in rows else padding
        largest[layer, expert] = max(largest[layer, expert], slot.largest)
    assert any(padding[key] > real[key] for key in padding), (
        "a corpus in which padding never would have won tells nothing"
    )
    run = record_ids(module, sequences)
    stored = run.store.fetch("SELECT layer, expert, max_abs_out FROM experts WHERE run_id = ?", [run.run_id])
    for layer, expert, value in stored:
        assert (value or 0.0) == pytest.approx(real[layer, expert], rel=1e-5)
