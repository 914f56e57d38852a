"""Real weights: the massive activation of SmolLM2-135M taken apart, cut, set to zero and to its mean, in two texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moescope as ms
from moescope.probes.batches import BatchPlan
from moescope.probes.corpus import Corpus
from moescope.probes.phenomena.chain import chosen_batches, cut_links
from moescope.probes.phenomena.chain_cuts import massive_cuts, part_cut
from moescope.probes.phenomena.massive import massive_places, stream_means
from moescope.probes.phenomena.writers import Place, take_apart
from moescope.store.store import Store

TEXTS = (
    "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is Madrid.",
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, I went to sea.",
)


@pytest.mark.slow
def test_the_massive_activation_of_smollm2_is_cut_at_its_writer_and_carries_no_information(
    smollm2: Any, store: Store
) -> None:
    run = ms.record(smollm2, list(TEXTS), store, name="smollm2", probes=("tokens", "residual"), progress=False)
    places = massive_places(run, layer=11)
    assert places is not None
    assert (places.layer, places.channel, dict(places.places)) == (11, 507, {0: 0, 1: 0})
    assert {247, 507} <= set(places.first_channels)
    assert places.on_first_tokens
    assert places.peak > 20_000
    plan = BatchPlan(Corpus.load(list(TEXTS)), smollm2.tokenizer, 2, 64)
    batches, calibration = chosen_batches(plan, texts=2, batch_size=2)
    origin = take_apart(smollm2, batches, [Place(n, 11, 0, 507) for n in (0, 1)])
    assert abs(origin.rest) < 1e-5
    writers = origin.writers()
    assert {(part.kind, part.layer) for part in writers} == {("neuron", 11)}
    assert sum(part.share for part in writers) > 0.85
    assert _without(smollm2, [part.number for part in writers]) < 0.15 * places.value, "their columns at zero, by hand"
    means = stream_means(smollm2, calibration, 11, ())
    cuts = [part_cut(smollm2, writers, None, draws=1, seed=0), *massive_cuts(smollm2, places, means, draws=1, seed=0)]
    effects, _ = cut_links(smollm2, batches, cuts, places=places, heads=[])
    numbers = [_numbers(effect.target) for effect in effects]
    controls = [_numbers(effect.controls[0]) for effect in effects]
    writer, zero, mean = numbers
    assert writer["massive_share"] < 0.1
    assert writer["sink_share"] < 0.6
    assert zero["delta_nll"] > 1.0
    assert abs(mean["delta_nll"]) < 0.2 < zero["delta_nll"]
    for control in controls:
        assert control["massive_share"] == pytest.approx(1.0, abs=0.01)
        assert control["sink_share"] == pytest.approx(1.0, abs=0.02)
        assert abs(control["delta_nll"]) < 0.1


def _numbers(rows: Any) -> dict[str, float]:
    return {row.metric: row.value for row in rows if row.group_kind == "all"}


def _without(model: Any, neurons: list[int]) -> float:
    """|x| in channel 507 at the first token after block 11, with columns of the down projection at zero."""
    block = model.module.model.layers[11]
    weight, seen = block.mlp.down_proj.weight, []
    kept = weight[:, neurons].clone()
    handle = block.register_forward_hook(
        lambda _, __, out: seen.append(float((out[0] if isinstance(out, tuple) else out)[0, 0, 507].abs()))
    )
    try:
        with torch.no_grad():
            weight[:, neurons] = 0.0
            model.module(input_ids=model.tokenizer(TEXTS[0], return_tensors="pt")["input_ids"], use_cache=False)
    finally:
        handle.remove()
        with torch.no_grad():
            weight[:, neurons] = kept
    return seen[0]
