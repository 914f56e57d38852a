"""Passes that stop after the last block needed: the same vectors, nothing computed behind it, nothing left behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moescope as ms
from moescope.core.errors import InputError, RunError
from moescope.core.sites import Site
from moescope.probes.forward import DeviceBatch
from moescope.probes.stopping import check_same, run_until
from moescope.store.vectors import vector_shards

LENGTHS = (9, 4, 1, 12, 7)
STOP = 0  # the first of two blocks, of three in DeepSeek


def vectors(run: Any, site: str) -> list[Any]:
    return [(shard.token, shard.raw) for shard in vector_shards(run, site)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "olmoe", "deepseek_v3"])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_vectors_are_those_of_whole_passes(
    family: str, padding: str, tiny_model: Callable[..., Any], token_ids: Callable[..., Any], store: Any
) -> None:
    model, corpus = ms.load(tiny_model(family)), ms.Corpus.from_token_ids(token_ids(LENGTHS))
    names = ["resid_pre", "resid_post", "attn_out", "mlp_out"]
    sites = [f"blocks.{STOP}.hook_{name}" for name in names]
    if family in ("qwen3_moe", "olmoe"):
        sites += [f"blocks.{STOP}.mlp.{name}" for name in ("experts.hook_out", "experts.hook_post")]
    else:
        sites += [f"blocks.{STOP}.mlp.hook_post", f"blocks.{STOP}.attn.hook_z"]
    given: dict[str, Any] = {"probes": ("activations",), "sites": sites, "batch_size": 2, "progress": False}
    whole = ms.record(model, corpus, store, name="whole", padding=padding, **given)
    part = ms.record(model, corpus, store, name="part", padding=padding, stop_after=STOP, **given)
    assert part.status == "complete"
    assert part.info["settings"]["stop_after"] == STOP
    for site in sites:
        for (tokens, ours), (same, theirs) in zip(vectors(part, site), vectors(whole, site), strict=True):
            assert np.array_equal(tokens, same)
            assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_what_is_not_computed_is_null_and_not_expected(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any], store: Any
) -> None:
    site = "blocks.1.hook_resid_pre"
    run = record_ids(tiny_model("llama"), token_ids(LENGTHS), probes=["activations"], sites=[site], stop_after=1)
    counts = store.fetch("SELECT count(*), count(token_id), count(nll), count(predicted_id) FROM tokens")
    assert counts == [(sum(LENGTHS), sum(LENGTHS), 0, 0)]
    ledger = {row["site"]: row["status"] for row in run.coverage.df().to_dict("records")}
    assert "tokens.nll" not in ledger
    assert set(ledger.values()) == {"complete"}
    with pytest.raises(InputError, match="no NLL"):
        ms.analyze(run, "nll")


def test_a_report_on_such_a_run_is_written(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any], tmp_path: Path
) -> None:
    run = record_ids(tiny_model("llama"), token_ids(LENGTHS), probes=[], stop_after=0)
    ms.write_report(run, tmp_path / "report.html")
    assert "no NLL" in (tmp_path / "report.html").read_text()


def test_nothing_behind_the_block_runs_and_nothing_remains(tiny_model: Callable[..., Any]) -> None:
    model = ms.load(tiny_model("deepseek_v3"))
    batch = DeviceBatch(torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4, dtype=torch.bool))
    before = {name: len(m._forward_hooks) for name, m in model.module.named_modules()}
    plain = model.module(batch.ids).logits
    ran: list[str] = []
    hooks = [
        m.register_forward_pre_hook(lambda _m, _i, name=name: ran.append(name))
        for name, m in model.module.named_modules()
    ]
    with torch.no_grad():
        run_until(model, batch, 1)
    for hook in hooks:
        hook.remove()
    assert "model.layers.1" in ran
    assert not [name for name in ran if name.startswith(("model.layers.2", "model.norm", "lm_head"))]
    assert before == {name: len(m._forward_hooks) for name, m in model.module.named_modules()}
    assert torch.equal(model.module(batch.ids).logits, plain)


def test_tensors_of_a_stopped_pass_are_let_go(tiny_model: Callable[..., Any]) -> None:
    model = ms.load(tiny_model("llama"))
    batch = DeviceBatch(torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4, dtype=torch.bool))
    made: list[Any] = []
    hook = model.module.model.layers[0].mlp.register_forward_hook(lambda _m, _i, out: made.append(weakref.ref(out)))
    gc.disable()
    try:
        with torch.no_grad():
            run_until(model, batch, 0)
        assert [ref() for ref in made] == [None]
    finally:
        gc.enable()
        hook.remove()


def test_hooks_that_are_always_called_are_called(tiny_model: Callable[..., Any]) -> None:
    model = ms.load(tiny_model("llama"))
    batch = DeviceBatch(torch.tensor([[5, 6]]), torch.ones(1, 2, dtype=torch.bool))
    outputs: list[Any] = []
    hook = model.module.register_forward_hook(lambda _m, _i, out: outputs.append(out), always_call=True)
    with torch.no_grad():
        run_until(model, batch, 0)
    hook.remove()
    assert outputs == [None]


def test_a_stopped_run_goes_on_where_it_was(
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    store: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from moescope.probes import passes

    model, corpus = ms.load(tiny_model("llama")), ms.Corpus.from_token_ids(token_ids(LENGTHS))
    site = "blocks.0.hook_resid_post"
    given: dict[str, Any] = {
        "probes": ("activations",),
        "sites": [site],
        "batch_size": 1,
        "progress": False,
        "stop_after": 0,
    }
    calls, whole = iter(range(3)), run_until

    def interrupted(*args: Any) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        whole(*args)

    monkeypatch.setattr(passes, "run_until", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ms.record(model, corpus, store, name="run", **given)
    monkeypatch.undo()
    with pytest.raises(InputError, match="begun with another stop after"):
        ms.record(model, corpus, store, name="run", resume=True, **{**given, "stop_after": 1})
    run = ms.record(model, corpus, store, name="run", resume=True, **given)
    assert run.status == "complete"
    assert sum(len(tokens) for tokens, _ in vectors(run, site)) == sum(LENGTHS)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"stop_after": 2}, "no block 2"),
        ({"stop_after": -1}, "no block -1"),
        ({"stop_after": 0, "generate": 3}, "continue a text"),
        ({"stop_after": 0, "budget": "1GB"}, "whole passes"),
        ({"stop_after": 0, "sites": ["blocks.1.hook_resid_pre"]}, "the probe activations needs block 1"),
        ({"stop_after": 0, "probes": ["residual"]}, "the probe residual needs block 1"),
        ({"stop_after": 0, "probes": ["routing"]}, "the probe routing needs block 1"),
        ({"stop_after": 0, "intervention": "ablate"}, "intervention"),
    ],
)
def test_what_cannot_be_done_without_the_rest_is_refused(
    options: dict[str, Any],
    told: str,
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
    store: Any,
) -> None:
    if "intervention" in options:
        options = options | {"intervention": ms.Intervention([ms.edits.Ablate(layer=0, experts=[1])])}
    options = {"probes": ["tokens"], **options}
    with pytest.raises(InputError, match=told):
        record_ids(tiny_model("qwen3_moe"), token_ids(LENGTHS), **options)
    assert not store.runs()


def test_a_session_of_edits_around_it_is_refused(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], store: Any
) -> None:
    model, corpus = ms.load(tiny_model("qwen3_moe")), ms.Corpus.from_token_ids(token_ids(LENGTHS))
    cut = ms.Intervention([ms.edits.Ablate(layer=0, experts=[1])])
    with model.edited(cut), pytest.raises(InputError, match="run to their end"):
        ms.record(model, corpus, store, name="run", probes=["tokens"], stop_after=0, progress=False)


def test_an_encoder_decoder_is_refused(token_ids: Callable[..., Any], record_ids: Callable[..., Any]) -> None:
    from moescope.probes.families.tiny import build_tiny

    with pytest.raises(InputError, match="two stacks"):
        record_ids(build_tiny("switch_transformers"), token_ids((5, 4)), probes=["tokens"], stop_after=0)


def test_a_block_that_never_runs_as_a_module_is_told(tiny_model: Callable[..., Any]) -> None:
    model = ms.load(tiny_model("llama"))
    block = model.module.model.layers[1]
    model.module.model.layers[1].__class__ = type("Passing", (type(block),), {"__call__": type(block).forward})
    batch = DeviceBatch(torch.tensor([[5, 6]]), torch.ones(1, 2, dtype=torch.bool))
    with torch.no_grad(), pytest.raises(RunError, match="cannot be stopped after block 1"):
        run_until(model, batch, 1)


def test_a_model_whose_stopped_passes_differ_is_told(tiny_model: Callable[..., Any]) -> None:
    """One that runs a block before it is its turn: a whole pass has given the tap another tensor by its end."""
    model = ms.load(tiny_model("llama"))
    first, second = model.module.model.layers
    batch = DeviceBatch(torch.tensor([[5, 6]]), torch.ones(1, 2, dtype=torch.bool))
    plain = second.forward

    def again(hidden: Any, **named: Any) -> Any:
        return plain(first(hidden, **named), **named)

    second.forward = again
    with pytest.raises(RunError, match="other vectors"):
        check_same(model, batch, [Site(0, "", "hook_resid_post")], 0)


@pytest.mark.slow
def test_stopped_passes_of_a_real_model_are_bit_identical(smollm2: Any) -> None:
    from moescope.probes.batches import BatchPlan
    from moescope.sae.data.live import site_vectors

    texts = ["A short text.", "Another one, which is a little longer than the first, so that something is padded."]
    batch = next(iter(BatchPlan(ms.Corpus.load(texts), smollm2.tokenizer, 2, 64)))
    sites = [f"blocks.14.{name}" for name in ("hook_resid_post", "hook_mlp_out", "mlp.hook_in", "attn.hook_z")]
    part, whole = (site_vectors(smollm2, batch, sites, logits=logits) for logits in (False, True))
    for site in sites:
        assert torch.equal(part[site].vectors, whole[site].vectors)
    with torch.no_grad():
        made = smollm2.module.model.layers[14].mlp(part["blocks.14.mlp.hook_in"].vectors)
    torch.testing.assert_close(made, part["blocks.14.hook_mlp_out"].vectors, rtol=1e-4, atol=1e-4)
