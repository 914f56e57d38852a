"""On a CUDA device: the same numbers as on the CPU, and an edited pass that never waits for the device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import moescope as ms
import moescope.edits as e
from moescope.probes.edits.session import edited

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CUTS = [
    e.Intervention(),
    e.Intervention([e.Ablate(experts=[1])]),
    e.Intervention([e.Ablate(experts=[3], how="route_around")]),
    e.Intervention([e.Ablate(experts=[3], how="copy")]),
    e.Intervention([e.Keep(experts=range(5)), e.Scale(experts=[2], factor=2.0)]),
    e.Intervention([e.TopK(k=4, positions="2:6")]),
    e.Intervention([e.Force(experts=[6]), e.Bias(experts=[1], value=1.0)]),
    e.Intervention([e.RandomRouting(seed=1)]),
    e.Intervention([e.SwapExperts(first=0, second=3), e.TopP(p=0.4)]),
    e.Intervention([e.MixRouting(reference=[0.125] * 8, share=0.5)]),
    e.Intervention([e.Add(vector=[0.2] * 32, layer=0), e.MaskHead(heads=1)]),
]


@pytest.fixture
def waiting_is_an_error() -> Iterator[Callable[[], None]]:
    """Call it once everything is warm: from then on, whatever waits for the device raises."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def test_rows_under_edits_are_those_of_the_cpu(tiny_model: Callable[..., Any]) -> None:
    module = tiny_model("qwen3_moe", experts="eager")
    ids = torch.randint(1, 97, (len(CUTS), 12), generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", "cuda"):
        model = ms.load(copy.deepcopy(module).to(device))
        with edited(model, CUTS) as session:
            session.assign(range(len(CUTS)))
            found.append(logits_of(model, ids.to(device)).cpu())
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=1e-3)


def test_an_edited_pass_does_not_wait_for_the_device(
    tiny_model: Callable[..., Any], waiting_is_an_error: Callable[[], None]
) -> None:
    model = ms.load(tiny_model("qwen3_moe", dtype="bfloat16", experts="grouped_mm").to("cuda"))
    ids = torch.ones(len(CUTS), 12, dtype=torch.int64, device="cuda")
    logits_of(model, ids)
    with edited(model, CUTS) as session:
        session.assign(range(len(CUTS)))
        logits_of(model, ids)
        waiting_is_an_error()
        logits_of(model, ids)
