"""Shared experts in `experts`: against the module's own output, and beside routed experts that do not change for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import moescope as ms
from moescope.core.errors import RunError
from moescope.probes.recorders.experts import ExpertsProbe, has_shared

LENGTHS = (7, 12, 3, 9, 5)
TOKENS = sum(LENGTHS)
SHARED = """
    SELECT layer, expert, tokens, weight_sum, output_norm_mean, weighted_norm_sum, max_abs_out, max_abs_channel,
        max_abs_token, active_share, zero_share
    FROM experts
    WHERE run_id = ? AND expert < 0
    ORDER BY layer
"""
ROUTED = "SELECT * EXCLUDE (run_id) FROM experts WHERE run_id = ? AND expert >= 0 ORDER BY layer, block, expert"


def added_by_shared(module: Any, sequences: list[list[int]]) -> dict[int, torch.Tensor]:
    """Layer → what shared experts add to each token, one sequence at a time, from the modules' own outputs."""
    found: dict[int, list[torch.Tensor]] = {}
    handles = []
    for layer, block in enumerate(module.model.layers):
        owner = block.mlp
        shared = getattr(owner, "shared_expert", None) or getattr(owner, "shared_experts", None)
        if shared is None:
            continue
        gate = getattr(owner, "shared_expert_gate", None)

        def note(_m: Any, inputs: Any, out: torch.Tensor, layer: int = layer, gate: Any = gate) -> None:
            factor = 1.0 if gate is None else torch.sigmoid(inputs[0] @ gate.weight.t())
            found.setdefault(layer, []).append((factor * out).reshape(-1, out.shape[-1]))

        handles.append(shared.register_forward_hook(note))
    with torch.no_grad():
        for row in sequences:
            module(input_ids=torch.tensor([row]), use_cache=False)
    for handle in handles:
        handle.remove()
    return {layer: torch.cat(parts) for layer, parts in found.items()}


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2_moe"])
def test_the_row_of_shared_experts_is_what_a_loop_over_tokens_finds(
    family: str, tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    sequences = token_ids(LENGTHS)
    run = record_ids(tiny_model(family), sequences, batch_size=2)
    assert run.status == "complete"
    added = added_by_shared(tiny_model(family), sequences)
    rows = run.store.fetch(SHARED, [run.run_id])
    assert [row[:2] for row in rows] == [(layer, -1) for layer in sorted(added)]
    for layer, _, tokens, weight, norm, weighted, largest, channel, token, *neurons in rows:
        out = added[layer]
        assert (tokens, weight) == (TOKENS, TOKENS)
        norms = out.double().norm(dim=-1)
        assert norm == pytest.approx(float(norms.mean()), rel=1e-5)
        assert weighted == pytest.approx(float(norms.sum()), rel=1e-5)
        assert largest == pytest.approx(float(out.abs().max()), rel=1e-5)
        assert abs(float(out[token, channel])) == pytest.approx(largest, rel=1e-5)
        assert neurons == [None, None]


def test_loads_and_rows_of_routed_experts_are_the_same_without_shared_ones(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    sequences = token_ids(LENGTHS)
    beside = record_ids(tiny_model("deepseek_v3"), sequences, name="with", batch_size=2)
    monkeypatch.setattr("moescope.probes.recorders.experts.has_shared", lambda _s: False)
    alone = record_ids(tiny_model("deepseek_v3"), sequences, name="without", batch_size=2)
    store = beside.store
    assert store.fetch(ROUTED, [beside.run_id]) == store.fetch(ROUTED, [alone.run_id])
    loads = "SELECT * EXCLUDE (run_id) FROM loads WHERE run_id = ? ORDER BY ALL"
    assert store.fetch(loads, [beside.run_id]) == store.fetch(loads, [alone.run_id])
    assert store.fetch("SELECT count(*) FROM experts WHERE run_id = ? AND expert < 0", [alone.run_id]) == [(0,)]
    slots = {row["site"]: row["recorded"] for row in alone.coverage.table.to_pylist()}
    shown = {row["site"]: row["recorded"] for row in beside.coverage.table.to_pylist()}
    assert slots == shown, "the ledger stays as it is"


def test_shared_experts_that_were_not_seen_are_told(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plain = ExpertsProbe.tap

    def blind(self: Any, site: Any, tensors: Any) -> Any:
        return {} if "shared" in site.tensor else plain(self, site, tensors)

    monkeypatch.setattr(ExpertsProbe, "tap", blind)
    run = record_ids(tiny_model("deepseek_v3"), token_ids(LENGTHS), batch_size=2)
    assert run.status == "incomplete"
    wrong = [row for row in run.coverage.table.to_pylist() if row["status"] != "complete"]
    assert {row["site"] for row in wrong} == {f"blocks.{layer}.mlp.experts.hook_out" for layer in (1, 2)}
    assert all("shared experts was not seen" in row["detail"] for row in wrong)


def test_sums_of_a_stopped_run_keep_shared_experts_apart(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The run is cut after two batches; resumed it has the rows of an unbroken one."""
    import moescope.store.writer as writer

    monkeypatch.setattr(writer, "CHUNK_ROWS", 1)
    module, sequences = tiny_model("deepseek_v3"), token_ids(LENGTHS)
    whole = record_ids(module, sequences, name="whole", batch_size=2)
    plain, seen = ExpertsProbe.rows, []

    def stop_at_third(self: Any, host: Any, records: Any) -> None:
        seen.append(1)
        if len(seen) == 3:
            raise RunError("the disk is gone")
        plain(self, host, records)

    with monkeypatch.context() as broken:
        broken.setattr(ExpertsProbe, "rows", stop_at_third)
        with pytest.raises(RunError, match="the disk is gone"):
            record_ids(module, sequences, name="cut", batch_size=2)
    resumed = record_ids(module, sequences, name="cut", batch_size=2, resume=True)
    assert resumed.status == "complete"
    store = whole.store
    every = "SELECT * EXCLUDE (run_id) FROM experts WHERE run_id = ? ORDER BY layer, block, expert"
    assert store.fetch(every, [resumed.run_id]) == store.fetch(every, [whole.run_id])


def test_a_model_without_shared_experts_has_no_such_site(demo_model: Any) -> None:
    probe_sites = ExpertsProbe(ms_context(demo_model)).sites(demo_model.anatomy)
    assert not any(has_shared(s) for s in demo_model.anatomy.moe)
    assert not [site for site in probe_sites if "shared" in site.tensor]


def ms_context(model: ms.LiveModel) -> Any:
    from moescope.probes.probe import ProbeContext

    return ProbeContext(model.anatomy, model.tokenizer)
