"""A run is complete only if every event is in the store; whatever is lost, doubled or wrong is named, site by site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from moescope.probes.recorders.experts import ExpertsProbe
from moescope.probes.recorders.residual import ResidualProbe
from moescope.probes.recorders.routing import RoutingProbe
from moescope.probes.recorders.tokens import TokensProbe
from moescope.store.writer import RunWriter

LENGTHS = (7, 1, 12, 4, 9)
TOKENS = sum(LENGTHS)


def ledger(run: Any) -> dict[str, tuple[int, int, str]]:
    return {row["site"]: (row["expected"], row["recorded"], row["status"]) for row in run.coverage.table.to_pylist()}


def faults(run: Any) -> dict[str, str]:
    """Sites that are not complete; a run that has some must say so itself."""
    found = {site: status for site, (_, _, status) in ledger(run).items() if status != "complete"}
    assert run.status == ("incomplete" if found else "complete")
    assert run.complete == (not found)
    assert run.coverage.incomplete == bool(found)
    return found


def detail(run: Any, site: str) -> str:
    return next(row["detail"] for row in run.coverage.table.to_pylist() if row["site"] == site)


@pytest.fixture
def qwen(tiny_model: Callable[..., Any]) -> Any:
    return tiny_model("qwen3_moe")


@pytest.fixture
def recorded(record_ids: Callable[..., Any], token_ids: Callable[..., Any]) -> Callable[..., Any]:
    return lambda module, **options: record_ids(module, token_ids(LENGTHS), **{"batch_size": 2, **options})


@pytest.mark.parametrize(
    ("family", "k", "layers", "moe_layers"),
    [("qwen3_moe", 2, [0, 1], [0, 1]), ("olmoe", 3, [0, 1], [0, 1]), ("deepseek_v3", 3, [0, 1, 2], [1, 2])],
)
def test_a_good_run_is_complete_at_every_site(
    family: str,
    k: int,
    layers: list[int],
    moe_layers: list[int],
    tiny_model: Callable[..., Any],
    recorded: Callable[..., Any],
) -> None:
    run = recorded(tiny_model(family))
    expected = {
        "documents": len(LENGTHS),
        "sequences": len(LENGTHS),
        "tokens": TOKENS,
        "tokens.nll": TOKENS - len(LENGTHS),
        **{f"blocks.{layer}.hook_resid_post": TOKENS for layer in layers},
        **{f"blocks.{layer}.hook_resid_post median": len(LENGTHS) for layer in layers},
        **{f"blocks.{layer}.mlp.hook_expert_indices": TOKENS * k for layer in moe_layers},
        **{f"blocks.{layer}.mlp.experts.hook_out": TOKENS * k for layer in moe_layers},
        **{f"blocks.{layer}.mlp.experts.hook_post": TOKENS * k for layer in moe_layers},
        **{f"blocks.{layer}.mlp.hook_router_logits": TOKENS for layer in moe_layers},
    }
    assert ledger(run) == {site: (n, n, "complete") for site, n in expected.items()}
    assert faults(run) == {}


def test_a_dense_run_expects_nothing_of_routers(tiny_model: Callable[..., Any], recorded: Callable[..., Any]) -> None:
    run = recorded(tiny_model("llama"))
    assert faults(run) == {}
    assert not [site for site in ledger(run) if "mlp" in site]


@pytest.mark.parametrize(
    ("probe", "site", "also"),
    [
        (RoutingProbe, "blocks.1.mlp.hook_expert_indices", ["blocks.1.mlp.hook_router_logits"]),
        (ExpertsProbe, "blocks.1.mlp.experts.hook_post", ["blocks.1.mlp.experts.hook_out"]),
        (ResidualProbe, "blocks.1.hook_resid_post", ["blocks.1.hook_resid_post median"]),
    ],
)
def test_a_tap_that_keeps_nothing_at_one_layer_is_absent_there(
    probe: type[Any],
    site: str,
    also: list[str],
    qwen: Any,
    recorded: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = probe.tap
    monkeypatch.setattr(probe, "tap", lambda self, at, x: {} if str(at) == site else plain(self, at, x))
    run = recorded(qwen)
    assert faults(run) == dict.fromkeys([site, *also], "absent")
    assert ledger(run)[site][1] == 0
    assert "never fired" in detail(run, site)


@pytest.mark.parametrize(
    ("probe", "site"),
    [
        (RoutingProbe, "blocks.0.mlp.hook_expert_indices"),
        (ExpertsProbe, "blocks.0.mlp.experts.hook_post"),
        (ResidualProbe, "blocks.0.hook_resid_post"),
    ],
)
def test_a_tap_that_misses_one_batch_is_short_by_its_events(
    probe: type[Any], site: str, qwen: Any, recorded: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, firings = probe.tap, []

    def missing(self: Any, at: Any, tensors: Any) -> Any:
        firings.append(str(at))
        # The first is the check before the run; then come the batches.
        return {} if str(at) == site and firings.count(site) == 3 else plain(self, at, tensors)

    monkeypatch.setattr(probe, "tap", missing)
    run = recorded(qwen)
    expected, found, status = ledger(run)[site]
    lost = sum(LENGTHS[2:4]) * (expected // TOKENS)
    assert (found, status) == (expected - lost, "short")
    assert faults(run)[site] == "short"
    assert f"{lost:,} events are missing" in detail(run, site)


def test_experts_that_are_called_past_their_hooks_are_absent(qwen: Any, recorded: Callable[..., Any]) -> None:
    """`experts.forward(…)` instead of `experts(…)` runs no hook: the decision goes by unseen, and is missed."""
    block = qwen.model.layers[1].mlp

    def past_the_hooks(hidden: Any) -> Any:
        rows = hidden.reshape(-1, hidden.shape[-1])
        _, weights, ids = block.gate(rows)
        return block.experts.forward(rows, ids, weights).reshape(hidden.shape)

    block.forward = past_the_hooks
    assert faults(recorded(qwen)) == {
        "blocks.1.mlp.hook_expert_indices": "absent",
        "blocks.1.mlp.hook_router_logits": "absent",
    }


@pytest.mark.parametrize(
    ("probe", "table", "sites"),
    [
        (TokensProbe, "tokens", ["tokens", "tokens.nll"]),
        (ResidualProbe, "residual", ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]),
        (
            RoutingProbe,
            "routing",
            [f"blocks.{n}.mlp.hook_{name}" for n in (0, 1) for name in ("expert_indices", "router_logits")],
        ),
    ],
)
def test_rows_written_twice_are_an_excess(
    probe: type[Any],
    table: str,
    sites: list[str],
    qwen: Any,
    recorded: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = probe.rows

    def doubling(self: Any, host: Any, records: Any) -> None:
        plain(self, host, records)
        records.tables[table] = pa.concat_tables([records.tables[table]] * 2)

    monkeypatch.setattr(probe, "rows", doubling)
    run = recorded(qwen)
    assert faults(run) == dict.fromkeys(sites, "excess")
    assert all(found == 2 * expected for site, (expected, found, _) in ledger(run).items() if site in sites)


@pytest.mark.parametrize("twice", ["block", "mlp", "experts"])
def test_a_module_that_runs_twice_in_a_pass_is_not_called_complete(
    twice: str, qwen: Any, recorded: Callable[..., Any]
) -> None:
    """Each site holds one event a token: of two passes one would be lost without a word."""
    block = qwen.model.layers[0]
    if twice == "experts":
        gate, experts = block.mlp.gate, block.mlp.experts

        def forward(hidden: Any) -> Any:
            rows = hidden.reshape(-1, hidden.shape[-1])
            _, weights, ids = gate(rows)
            half = experts(rows, ids, weights)
            return (half + experts(rows, ids, weights)).reshape(hidden.shape)

        block.mlp.forward = forward
    elif twice == "mlp":
        plain_mlp = block.mlp.forward
        block.mlp.forward = lambda hidden: plain_mlp(plain_mlp(hidden))
    else:
        model = qwen.model
        model.layers = torch.nn.ModuleList([block, *model.layers])  # the same block, once more
        model.config.num_hidden_layers = 3
        model.config.layer_types = ["full_attention"] * 3
    assert any(site.startswith("blocks.0.") for site in faults(recorded(qwen)))


def test_the_ledger_counts_what_is_in_the_store(
    qwen: Any, recorded: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that were made but never written are missing, whatever was counted while recording."""
    plain = RunWriter._insert

    def leaking(self: Any, name: str, rows: pa.Table) -> None:
        plain(self, name, rows.slice(1) if name == "routing" else rows)

    monkeypatch.setattr(RunWriter, "_insert", leaking)
    run = recorded(qwen)
    assert faults(run) == {"blocks.0.mlp.hook_expert_indices": "short", "blocks.0.mlp.hook_router_logits": "short"}
    assert ledger(run)["blocks.0.mlp.hook_router_logits"][:2] == (TOKENS, TOKENS - 1)


@pytest.mark.parametrize(
    ("path", "sites"),
    [
        ("model.layers.1.mlp.experts.down_proj", ["blocks.1.mlp.experts.hook_out", "blocks.1.hook_resid_post"]),
        ("model.layers.1.mlp.gate.weight", ["blocks.1.mlp.hook_router_logits", "blocks.1.mlp.hook_expert_indices"]),
        ("lm_head.weight", []),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_make_the_run_invalid(
    path: str, sites: list[str], value: float, qwen: Any, recorded: Callable[..., Any]
) -> None:
    with torch.no_grad():
        qwen.get_parameter(path).fill_(value)
    run = recorded(qwen)
    found = faults(run)
    assert {site: found.get(site) for site in ["tokens.nll", *sites]} == dict.fromkeys(
        ["tokens.nll", *sites], "invalid"
    )
    assert not [site for site in found if site.startswith("blocks.0.")]


def test_one_nan_in_one_batch_is_enough(qwen: Any, recorded: Callable[..., Any], token_ids: Callable[..., Any]) -> None:
    last = token_ids(LENGTHS)[-1][-1]
    with torch.no_grad():
        qwen.model.embed_tokens.weight[last] = torch.nan
    run = recorded(qwen)
    assert faults(run)["blocks.0.hook_resid_post"] == "invalid"
    assert "NaN" in detail(run, "blocks.0.hook_resid_post")


def test_probabilities_in_place_of_router_logits_are_invalid(qwen: Any, recorded: Callable[..., Any]) -> None:
    gate = qwen.model.layers[1].mlp.gate
    plain = gate.forward

    def softmaxed(hidden: Any) -> Any:
        logits, weights, ids = plain(hidden)
        return logits.softmax(-1), weights, ids

    gate.forward = softmaxed
    run = recorded(qwen)
    assert faults(run) == {"blocks.1.mlp.hook_router_logits": "invalid"}
    assert "probabilities, not logits" in detail(run, "blocks.1.mlp.hook_router_logits")


@pytest.mark.parametrize("wrong", [8, 9, 255, -1])
def test_an_expert_id_out_of_range_is_invalid(
    wrong: int, qwen: Any, recorded: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 experts have ids 0 to 7; a wrong id must neither end the run nor pass for a load of another expert."""
    plain = RoutingProbe.tap

    def misread(self: Any, site: Any, tensors: Any) -> Any:
        kept = dict(plain(self, site, tensors))
        if str(site) == "blocks.1.mlp.hook_expert_indices":
            kept["ids"] = kept["ids"].clone()
            kept["ids"][0, 0] = wrong
        return kept

    monkeypatch.setattr(RoutingProbe, "tap", misread)
    run = recorded(qwen)
    assert faults(run) == {"blocks.1.mlp.hook_expert_indices": "invalid"}
    assert str(wrong) in detail(run, "blocks.1.mlp.hook_expert_indices")


def test_a_wrong_id_does_not_become_another_experts_maximum(
    qwen: Any, recorded: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the experts' tap is given for one slot is no expert's id, and its output is the largest of all."""
    plain = ExpertsProbe.tap

    def misread(self: Any, site: Any, tensors: Any) -> Any:
        ids, out = tensors["indices"].clone(), tensors["computed"].clone()
        ids[0] = torch.tensor([-1, 8])
        out[tensors["slot"] < 2] = 1e6
        return plain(self, site, {**tensors, "indices": ids, "computed": out})

    monkeypatch.setattr(ExpertsProbe, "tap", misread)
    run = recorded(qwen)
    sites = [f"blocks.{layer}.mlp.experts.{tensor}" for layer in (0, 1) for tensor in ("hook_out", "hook_post")]
    assert faults(run) == dict.fromkeys(sites, "short")
    ((largest,),) = run.store.fetch("SELECT max(max_abs_out) FROM experts WHERE run_id = ?", [run.run_id])
    assert largest < 1e6


def test_weights_that_are_changed_after_the_decision_was_read_do_not_change_the_record(
    qwen: Any, recorded: Callable[..., Any]
) -> None:
    """A model may reuse its tensors once the experts have run; the record keeps what the experts were given."""
    before = recorded(qwen, name="before").store.fetch("SELECT layer, token, weights FROM routing ORDER BY ALL")
    for layer in qwen.model.layers:
        plain = layer.mlp.experts.forward

        def reusing(hidden_states: Any, top_k_index: Any, top_k_weights: Any, plain: Any = plain) -> Any:
            out = plain(hidden_states, top_k_index, top_k_weights)
            top_k_weights.zero_()
            return out

        layer.mlp.experts.forward = reusing
    run = recorded(qwen, name="after")
    query = "SELECT layer, token, weights FROM routing WHERE run_id = ? ORDER BY ALL"
    assert run.store.fetch(query, [run.run_id]) == before


def test_run_wide_token_numbers_have_no_gap(qwen: Any, recorded: Callable[..., Any]) -> None:
    run = recorded(qwen)
    for table, per_token in (("tokens", 1), ("routing", 2), ("residual", 2)):
        rows = [token for (token,) in run.store.fetch(f"SELECT token FROM {table} WHERE run_id = ?", [run.run_id])]
        assert np.bincount(rows).tolist() == [per_token] * TOKENS
