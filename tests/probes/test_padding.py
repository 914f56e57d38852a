"""Padding changes nothing: at either side, by any amount, in any float type, on any device map."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import moescope as ms
from moescope.core.sites import EXPERT_INDICES, RESID_POST, Site
from moescope.probes.batches import Batch, BatchPlan
from moescope.probes.forward import logits_of, to_device
from moescope.probes.taps import tapped

LENGTHS = (7, 1, 12, 4, 9)
DECISIONS = """
    SELECT sequence_id, position, layer, experts, weights, margin, entropy
    FROM routing JOIN tokens USING (run_id, token)
    WHERE run_id = ?
    ORDER BY sequence_id, position, layer
"""
TOKENS = "SELECT token, sequence_id, position, token_id, nll, predicted_id FROM tokens WHERE run_id = ? ORDER BY token"


def assert_same_but_for_rounding(first: Any, second: Any) -> None:
    """Equal decisions wherever the margin tells them apart, and numbers that agree to float32 rounding."""
    pairs = list(zip(*(run.store.fetch(DECISIONS, [run.run_id]) for run in (first, second)), strict=True))
    assert len(pairs) == sum(LENGTHS) * 2
    clear = [(a, b) for a, b in pairs if min(a[5], b[5]) > 1e-4]
    assert len(clear) > 0.95 * len(pairs)
    for a, b in clear:
        assert a[:4] == b[:4]
        assert a[4] == pytest.approx(b[4], abs=1e-5)
        assert a[6] == pytest.approx(b[6], abs=1e-5)
    for a, b in zip(*(run.store.fetch(TOKENS, [run.run_id]) for run in (first, second)), strict=True):
        assert a[:4] == b[:4]
        assert a[4] == (None if b[4] is None else pytest.approx(b[4], abs=1e-4))
        assert a[5] == b[5]


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral"])
def test_left_and_right_padding_give_the_same_records(
    family: str, tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    runs = [
        record_ids(tiny_model(family), token_ids(LENGTHS), name=name, batch_size=size, padding=side)
        for name, size, side in (("alone", 1, None), ("left", 5, "left"), ("right", 5, "right"), ("three", 3, "left"))
    ]
    assert [run.status for run in runs] == ["complete"] * 4
    assert [run.info["settings"]["padding"] for run in runs] == ["right", "left", "right", "left"]
    for run in runs[1:]:
        assert_same_but_for_rounding(runs[0], run)


def test_learned_positions_follow_the_mask(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    """A table of positions, not distances: without being told, the model would look up columns."""
    runs = [record_ids(tiny_model("gpt2"), token_ids(LENGTHS), name=side, padding=side) for side in ("left", "right")]
    assert [run.status for run in runs] == ["complete"] * 2
    for a, b in zip(*(run.store.fetch(TOKENS, [run.run_id]) for run in runs), strict=True):
        assert a[:4] == b[:4]
        assert a[4] == (None if b[4] is None else pytest.approx(b[4], abs=1e-4))


def test_medians_of_left_padded_sequences_leave_the_padding_out(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    query = "SELECT sequence_id, layer, median_abs FROM residual_sequences WHERE run_id = ? ORDER BY ALL"
    found = []
    for name, size in (("alone", 1), ("left", 5)):
        run = record_ids(tiny_model("qwen3_moe"), token_ids(LENGTHS), name=name, batch_size=size, padding="left")
        found.append([median for _, _, median in run.store.fetch(query, [run.run_id])])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_a_model_that_counts_positions_by_column_is_refused_at_the_left(
    store: Any, tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    def by_column(module: Any) -> Any:
        plain = module.forward

        def forward(input_ids: Any, attention_mask: Any = None, use_cache: bool = False) -> Any:
            return plain(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

        module.forward = forward
        return module

    with pytest.raises(ms.InputError, match="other logits for texts padded at the left"):
        record_ids(by_column(tiny_model("gpt2")), token_ids(LENGTHS), padding="left")
    assert store.runs() == []
    # One sequence a batch is never padded, and rotary positions are relative.
    assert record_ids(
        by_column(tiny_model("gpt2")), token_ids(LENGTHS), padding="left", batch_size=1, name="one"
    ).complete
    assert record_ids(by_column(tiny_model("llama")), token_ids(LENGTHS), padding="left", name="rotary").complete


def test_a_side_that_is_none_is_refused(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    with pytest.raises(ms.InputError, match="no padding at 'both'"):
        record_ids(tiny_model("llama"), token_ids((3,)), padding="both")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_every_float_type_is_recorded_as_the_model_ran_it(
    side: str,
    dtype: str,
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
) -> None:
    """Ids and weights are those that a plain pass over the same padded batch gives to the experts."""
    module, sequences = tiny_model("qwen3_moe", dtype=dtype), token_ids(LENGTHS)
    model = ms.load(module)
    plan = BatchPlan(ms.Corpus.from_token_ids(sequences), None, 8, 64)
    batch = to_device(next(iter(plan)), model, side=side)  # type: ignore[arg-type]
    given: dict[int, Any] = {}
    hooks = [
        layer.mlp.experts.register_forward_pre_hook(lambda _m, args, n=n: given.update({n: (args[1], args[2].float())}))
        for n, layer in enumerate(module.model.layers)
    ]
    with torch.no_grad():
        logits_of(model, batch)
    for hook in hooks:
        hook.remove()
    run = record_ids(module, sequences, padding=side)
    assert run.status == "complete"
    real = batch.mask.flatten()
    for layer, (ids, weights) in given.items():
        order = np.lexsort((ids[real].numpy(), -weights[real].numpy()), axis=-1)
        rows = run.store.fetch("SELECT experts, weights FROM routing WHERE layer = ? ORDER BY token", [layer])
        assert [row[0] for row in rows] == np.take_along_axis(ids[real].numpy(), order, 1).tolist()
        assert [row[1] for row in rows] == np.take_along_axis(weights[real].numpy(), order, 1).tolist()


def test_taps_work_with_gradients_on_and_leave_them_as_they_were(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any]
) -> None:
    module = tiny_model("qwen3_moe")
    model = ms.load(module)
    ids = torch.tensor(token_ids((9,)))
    seen: dict[Site, dict[str, torch.Tensor]] = {}
    sites = [
        Site(layer, block, tensor) for layer in (0, 1) for block, tensor in (("", RESID_POST), ("mlp", EXPERT_INDICES))
    ]

    def gradients() -> list[torch.Tensor]:
        module.zero_grad()
        module(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad.clone() for p in module.parameters() if p.grad is not None]

    plain = gradients()
    with tapped(module, model.anatomy, sites, lambda site, tensors: seen.update({site: tensors})):
        under_taps = gradients()
    assert len(plain) == len(under_taps) > 0
    assert all(torch.equal(a, b) for a, b in zip(plain, under_taps, strict=True))
    assert set(seen) == set(sites)
    assert seen[Site(1, "", RESID_POST)]["resid"].requires_grad


def test_a_recording_inside_a_gradient_context_keeps_no_graph(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    module = tiny_model("qwen3_moe")
    with torch.enable_grad():
        assert record_ids(module, token_ids(LENGTHS)).complete
        assert torch.is_grad_enabled()
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("generate", [0, 3])
def test_a_model_whose_layers_are_brought_in_from_disk_is_recorded(
    generate: int,
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
    store: Any,
) -> None:
    """Weights on the meta device, fetched by accelerate's hooks while a layer runs: the inputs' device is still found."""
    from accelerate import dispatch_model

    whole = record_ids(tiny_model("qwen3_moe"), token_ids(LENGTHS), name="whole", generate=generate)
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        spread = dispatch_model(
            tiny_model("qwen3_moe"), places, main_device="cpu", offload_dir=folder, force_hooks=True
        )
        assert spread.model.layers[0].mlp.experts.down_proj.is_meta
        model = ms.load(spread)
        assert model.device == torch.device("cpu")
        run = record_ids(spread, token_ids(LENGTHS), name="spread", generate=generate)
    assert run.status == "complete"
    query = "SELECT token, layer, experts FROM routing WHERE run_id = ? ORDER BY ALL"
    assert store.fetch(query, [run.run_id]) == store.fetch(query, [whole.run_id])


def test_embeddings_that_are_elsewhere_than_the_first_weights_take_the_inputs(tiny_model: Callable[..., Any]) -> None:
    module = tiny_model("llama")
    module.model.layers.to("meta")
    model = ms.load(module)
    assert model.device == torch.device("cpu")
    assert model.devices == ["cpu"]
    module.model.embed_tokens.to("meta")
    module.model.embed_tokens._hf_hook = type("Hook", (), {"execution_device": "cpu"})()
    assert model.device == torch.device("cpu")


def test_the_mask_goes_to_the_device_of_the_tensors(tiny_model: Callable[..., Any]) -> None:
    """Two devices in one model, stood in for by the CPU and the meta device."""
    from moescope.probes.passes import Passes
    from moescope.probes.probe import Probe, ProbeContext

    anatomy = ms.load(tiny_model("llama")).anatomy
    met: list[tuple[str, str]] = []

    class Watching(Probe):
        def sites(self, anatomy: Any) -> list[Site]:
            return [Site(layer, "", RESID_POST) for layer in (0, 1)]

        def tap(self, site: Site, tensors: Any) -> Any:
            met.append((tensors["resid"].device.type, tensors["mask"].device.type))
            return {}

        def rows(self, host: Any, records: Any) -> None:
            raise NotImplementedError

        def expectations(self, tokens: int, sequences: int) -> list[Any]:
            return []

    context = ProbeContext(anatomy)
    model = ms.load(tiny_model("llama"))
    passes = Passes(model, [Watching(context)], context, generate=0, side="right")
    batch = next(iter(BatchPlan(ms.Corpus.from_token_ids([[1, 2, 3]]), None, 1, 8)))
    with passes.open():
        passes._enter(batch, torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool))
        passes._receive(Site(0, "", RESID_POST), {"resid": torch.zeros(1, 3, 4)})
        passes._receive(Site(1, "", RESID_POST), {"resid": torch.zeros(1, 3, 4, device="meta")})
    assert met == [("cpu", "cpu"), ("meta", "meta")]


def test_a_device_map_is_for_models_that_load_reads_itself(tiny_model: Callable[..., Any]) -> None:
    with pytest.raises(ms.InputError, match="in memory already"):
        ms.load(tiny_model("llama"), device_map="auto")
    with pytest.raises(ms.InputError, match="pass one of them"):
        ms.load("demo", device="cpu", device_map="auto")
    assert isinstance(ms.load("demo", device_map={"": "cpu"}).module, torch.nn.Module)


def test_padding_at_the_left_moves_positions_along(tiny_model: Callable[..., Any]) -> None:
    model = ms.load(tiny_model("llama"))
    plan = BatchPlan(ms.Corpus.from_token_ids([[5, 6, 7], [8]]), None, 2, 8)
    batch = to_device(next(iter(plan)), model, side="left")
    assert batch.mask.tolist() == [[True, True, True], [False, False, True]]
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    whole = Batch(0, (next(iter(plan)).sequences[0],), 0)
    assert to_device(whole, model, side="left").positions is None
