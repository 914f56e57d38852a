"""Attention reduced in slices: no tensor grows with the square of the length; long texts of a real model in bounded time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import moescope as ms
from moescope.core.sites import Site
from moescope.probes import attention_slices
from moescope.probes.attention_reduced import attention_reduced
from moescope.probes.attention_slices import PatternSlices
from moescope.probes.attention_statistics import AttentionSums, reduce_pattern

SLICE = 128 << 10


def reduced(model: Any, length: int) -> dict[int, AttentionSums]:
    """One text through a model, with every layer's attention reduced."""
    found: dict[int, AttentionSums] = {}

    def receive(site: Site, slices: PatternSlices) -> None:
        found[site.layer] = reduce_pattern(slices, torch.ones(1, length, dtype=torch.bool), padded=False)

    ids = torch.randint(3, 97, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), attention_reduced(model, None, receive):
        model.module(input_ids=ids, use_cache=False, logits_to_keep=1)
    return found


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes that tensors held at once while something ran, by the allocator's own account."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = np.cumsum([e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())])
    return int(held.max(initial=0))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Kernels of several threads take a buffer a thread, at lengths of their own choice."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_memory_grows_linearly(tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_slices, "SLICE_BYTES_CPU", SLICE)
    model = ms.load(tiny_model("llama", max_position_embeddings=4096))
    reduced(model, 16)
    peaks = [peak_bytes(lambda length=length: reduced(model, length)) for length in (256, 512, 1024)]
    assert peaks[2] - peaks[1] < 2.2 * (peaks[1] - peaks[0])  # a quadratic would be four times
    assert peaks[2] < 4 * 4 * 1024**2 / 4  # of the whole pattern's bytes


@pytest.mark.usefixtures("one_thread")
def test_a_pattern_kept_whole_would_be_noticed(tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_slices, "SLICE_BYTES_CPU", 1 << 40)
    model = ms.load(tiny_model("llama", max_position_embeddings=4096))
    peaks = [peak_bytes(lambda length=length: reduced(model, length)) for length in (256, 512, 1024)]
    assert peaks[2] - peaks[1] > 3 * (peaks[1] - peaks[0])


def test_a_slice_is_no_larger_than_its_bytes() -> None:
    slices = PatternSlices((2, 4, 4096, 4096), torch.device("cpu"), lambda first, end: torch.empty(0))
    assert slices.step * 2 * 4 * 4096 * 4 <= attention_slices.SLICE_BYTES_CPU
    huge = PatternSlices((64, 128, 10**6, 10**6), torch.device("cpu"), lambda first, end: torch.empty(0))
    assert huge.step == 1


@pytest.mark.slow
def test_a_long_text_of_smollm2_takes_little_time_and_memory(smollm2: Any) -> None:
    reduced(smollm2, 16)
    peaks = [peak_bytes(lambda length=length: reduced(smollm2, length)) for length in (1024, 2048)]
    started = time.process_time()  # of all threads: no less than the clock of an idle machine shows
    peaks.append(peak_bytes(lambda: reduced(smollm2, 4096)))
    assert time.process_time() - started < 90
    assert peaks[2] < 2.2 * peaks[1] < 2.2**2 * peaks[0]  # twice the text, twice the memory
    assert peaks[2] < 9 * 4 * 4096**2 / 4  # of one layer's pattern, kept whole


@pytest.mark.slow
def test_sinks_of_smollm2_are_found_at_the_first_token(smollm2: Any, store: Any) -> None:
    text = "The harbour was quiet that morning, and nobody in the village had yet heard what the sea had brought. " * 5
    texts = [text, "In the year 1871 the observatory bought a new refractor, which was paid for by subscription. " * 5]
    run = ms.record(smollm2, texts, store, name="run", probes=["attention"], progress=False)
    assert run.complete
    frame = ms.analyze(run, "attention_sinks").df()
    rates = frame[frame["metric"] == "Sink_k"].sort_values("position")["value"].tolist()
    assert rates == pytest.approx(_sinks_by_eager(smollm2, texts), abs=2 / (2 * 270))  # an α at the threshold may round
    assert rates[0] > 0.5 > 5 * max(rates[1:])


def _sinks_by_eager(model: Any, texts: list[str]) -> list[float]:
    """Share of (text, head) pairs with α_k > 0.3, from the attentions that transformers gives."""
    flags = []
    model.module.set_attn_implementation("eager")
    try:
        for text in texts:
            ids = torch.tensor([model.tokenizer(text)["input_ids"]])
            with torch.no_grad():
                attentions = model.module(input_ids=ids, output_attentions=True, use_cache=False).attentions
            window = torch.cat(attentions)[:, :, :64, :64].flatten(0, 1)
            flags.append(torch.stack([window[:, k:, k].mean(-1) > 0.3 for k in range(10)], -1))
    finally:
        model.module.set_attn_implementation("sdpa")
    found: list[float] = torch.cat(flags).float().mean(0).tolist()
    return found
