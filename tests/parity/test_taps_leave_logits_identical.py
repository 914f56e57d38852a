"""With every default probe on, a model gives the logits it gives without moescope, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import moescope as ms
from moescope.probes.demo import MODEL_DIR

FAMILIES = ("qwen3_moe", "olmoe", "mixtral", "qwen2_moe", "deepseek_v3")
LENGTHS = (5, 64, 2, 33)  # padding in every batch of more than one
TEXTS = ("def f(x):\n    return x + 1\n", "The quick brown fox jumps over the lazy dog.", "Ja.", "x" * 90)


@contextmanager
def noted_calls(module: Any) -> Iterator[list[tuple[Any, Any, Any]]]:
    """Every (ids, mask, logits) of the module's forward passes, noted by a wrapper of its own `forward`."""
    calls: list[tuple[Any, Any, Any]] = []
    plain = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        calls.append((kwargs["input_ids"], kwargs["attention_mask"], output.logits.clone()))
        return output

    module.forward = forward
    try:
        yield calls
    finally:
        del module.forward


def assert_identical(calls: list[tuple[Any, Any, Any]], untouched: Any) -> None:
    with torch.no_grad():
        for ids, mask, logits in calls:
            plain = untouched(input_ids=ids, attention_mask=mask, use_cache=False).logits
            assert plain.dtype == logits.dtype
            assert torch.equal(plain, logits)


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recording_leaves_logits_of_moe_families_identical(
    family: str,
    dtype: str,
    experts: str,
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
) -> None:
    """One sequence at a time, and three with padding."""
    module, untouched = (tiny_model(family, dtype=dtype, experts=experts) for _ in range(2))
    for batch_size, batches in ((1, 4), (3, 2)):
        with noted_calls(module) as calls:
            run = record_ids(module, token_ids(LENGTHS), name=f"by {batch_size}", batch_size=batch_size)
        assert run.status == "complete"
        assert all(run.rows(table) for table in ("tokens", "routing", "experts", "residual"))
        assert len(calls) >= batches
        assert max(len(ids) for ids, _, _ in calls[-batches:]) == batch_size
        assert_identical(calls, untouched)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recording_leaves_logits_of_dense_models_identical(
    family: str, tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    module = tiny_model(family)
    with noted_calls(module) as calls:
        run = record_ids(module, token_ids(LENGTHS), batch_size=3)
    assert run.rows("residual") == run.rows("tokens") * 2
    assert len(calls) >= 2
    assert_identical(calls, tiny_model(family))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_recording_leaves_logits_of_the_demo_model_identical(dtype: str, batch_size: int, store: Any) -> None:
    model = ms.load("demo", dtype=dtype)
    with noted_calls(model.module) as calls:
        run = ms.record(model, list(TEXTS), store, name="run", batch_size=batch_size, progress=False)
    assert run.status == "complete"
    assert len(calls) >= math.ceil(len(TEXTS) / batch_size)
    assert_identical(calls, AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=getattr(torch, dtype)))


@pytest.mark.slow
def test_recording_leaves_logits_of_smollm2_identical_on_a_few_tokens(smollm2: Any, store: Any) -> None:
    with noted_calls(smollm2.module) as calls:
        run = ms.record(smollm2, ["Once upon a time", "Hi"], store, name="run", progress=False)
    assert run.status == "complete"
    assert len(calls) >= 1
    assert_identical(calls, smollm2.module)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3])
def test_recording_leaves_logits_of_smollm2_identical(smollm2: Any, store: Any, batch_size: int) -> None:
    with noted_calls(smollm2.module) as calls:
        run = ms.record(smollm2, list(TEXTS), store, name="run", batch_size=batch_size, progress=False)
    assert run.status == "complete"
    assert len(calls) >= math.ceil(len(TEXTS) / batch_size)
    assert_identical(calls, smollm2.module)


def test_the_comparison_notices_a_changed_bit(tiny_model: Callable[..., Any], token_ids: Callable[..., Any]) -> None:
    module = tiny_model("qwen3_moe")
    ids = torch.tensor(token_ids([6]))
    with noted_calls(module) as calls, torch.no_grad():
        module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    other = tiny_model("qwen3_moe")
    with torch.no_grad():
        other.lm_head.weight[0] *= 1 + 2**-20
    with pytest.raises(AssertionError):
        assert_identical(calls, other)


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm", "eager"])
def test_recording_keeps_the_experts_implementation_it_found(
    experts: str, tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    module = tiny_model("qwen3_moe", experts=experts)
    run = record_ids(module, token_ids(LENGTHS))
    assert run.info["settings"]["experts"] == experts
    assert module.config._experts_implementation == experts


def test_selfcheck_refuses_a_model_that_taps_change(
    demo_model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from moescope.probes import selfcheck
    from moescope.probes.recorders.residual import ResidualProbe

    assert "bit-identical" in selfcheck.compare_logits(demo_model, list(TEXTS[:2]))
    plain_tap = ResidualProbe.tap

    def meddling_tap(self: Any, site: Any, tensors: Any) -> Any:
        tensors["resid"].mul_(1.5)
        return plain_tap(self, site, tensors)

    monkeypatch.setattr(ResidualProbe, "tap", meddling_tap)
    with pytest.raises(ms.RunError, match="taps change this model's logits"):
        selfcheck.compare_logits(demo_model, list(TEXTS[:2]))
