"""Taps run on the model's device and read nothing back: where tensors have no values, a host read has none to give.

Shown twice: under FakeTensorMode, and on the meta device, where even a copy to the host is refused and no code meant for a
CPU alone can pass for the rest. Shapes are those of a batch of a large model in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

import moescope as ms
from moescope.core.probe import probes
from moescope.core.sites import EXPERT_INDICES, EXPERT_OUT, EXPERT_POST, RESID_POST, ROUTER_LOGITS, Site
from moescope.probes.likelihood import token_nll
from moescope.probes.probe import ProbeContext
from moescope.probes.routing_rule import BoundRule, RoutingRule
from moescope.probes.taps import tapped

ROWS, POSITIONS, WIDTH, EXPERTS, K, VOCABULARY = 8, 512, 2048, 64, 8, 50304
HOST_READ = (RuntimeError, NotImplementedError, TypeError, DynamicOutputShapeException)


@pytest.fixture(params=["fake", "meta"])
def without_values(request: pytest.FixtureRequest) -> Callable[[], Any]:
    """A context in which new tensors have shapes and no values."""
    return FakeTensorMode if request.param == "fake" else lambda: torch.device("meta")


def tensors_at(site: Site) -> dict[str, torch.Tensor]:
    """What passes a site, in the shapes `tapped` promises."""
    flat = ROWS * POSITIONS
    decision = {
        "indices": torch.zeros(flat, K, dtype=torch.int64),
        "weights": torch.zeros(flat, K, dtype=torch.bfloat16),
    }
    passing = {
        RESID_POST: {"resid": torch.zeros(ROWS, POSITIONS, WIDTH, dtype=torch.bfloat16)},
        ROUTER_LOGITS: {"logits": torch.zeros(flat, EXPERTS, dtype=torch.bfloat16)},
        EXPERT_INDICES: decision,
        EXPERT_OUT: {"out": torch.zeros(flat, K, WIDTH, dtype=torch.bfloat16), **decision},
        EXPERT_POST: {
            "computed": torch.zeros(flat * K, WIDTH, dtype=torch.bfloat16),
            "post": torch.zeros(flat * K, WIDTH // 2, dtype=torch.bfloat16),
            "slot": torch.zeros(flat * K, dtype=torch.int64),
            **decision,
        },
    }
    return {**passing[site.tensor], "mask": torch.ones(ROWS, POSITIONS, dtype=torch.bool)}


def context(tiny_model: Callable[..., Any], rule: str | None) -> ProbeContext:
    module = tiny_model("olmoe", num_experts=EXPERTS, num_experts_per_tok=K)
    made = ProbeContext(ms.load(module).anatomy)
    if rule:
        found = RoutingRule(rule, renormalise=True, agreement=1.0, choice_agreement=1.0, weight_agreement=1.0)  # type: ignore[arg-type]
        made.rules = {(layer, "mlp"): BoundRule(found, {}.__getitem__) for layer in (0, 1)}
    return made


@pytest.mark.parametrize("rule", [None, "softmax", "sigmoid"])
@pytest.mark.parametrize("name", ["routing", "experts", "residual"])
def test_no_tap_reads_back_to_the_host(
    name: str, rule: str | None, without_values: Any, tiny_model: Callable[..., Any]
) -> None:
    probe = probes[name].function(context(tiny_model, rule))
    sites = sorted(probe.sites(probe.context.anatomy), key=lambda site: (site.layer, site.tensor != ROUTER_LOGITS))
    assert len(sites) >= 2
    with without_values():
        for site in sites:
            given = tensors_at(site)
            kept = probe.tap(site, given)
            assert {tensor.device for tensor in kept.values()} <= {given["mask"].device}
            # What is copied out is small: at most 64 bytes a slot.
            assert sum(t.numel() * t.element_size() for t in kept.values()) <= 64 * ROWS * POSITIONS * K


def test_every_default_probe_is_among_those_checked() -> None:
    assert {entry.name for entry in probes if entry.default} == {"routing", "experts", "residual", "tokens"}
    assert probes["tokens"].function(ProbeContext(None)).sites(None) == []  # type: ignore[arg-type]


def test_losses_are_computed_without_a_host_read() -> None:
    with torch.device("meta"):
        ids = torch.zeros(2, 64, dtype=torch.int64)
        nll, best = token_nll(torch.zeros(2, 64, VOCABULARY, dtype=torch.bfloat16), ids)
    assert nll.shape == best.shape == (2, 64)
    assert nll.is_meta
    assert best.is_meta


@pytest.mark.parametrize(
    "reading",
    [
        lambda x: x.max().item(),
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.sum().tolist(),
        lambda x: x.numpy(),
    ],
)
def test_the_check_notices_a_host_read(reading: Callable[[Any], Any], without_values: Any) -> None:
    with without_values(), pytest.raises(HOST_READ):
        reading(torch.zeros(4, 4))


def test_the_check_on_the_meta_device_also_notices_a_copy_to_the_host() -> None:
    with pytest.raises(NotImplementedError):
        torch.zeros(4, device="meta").cpu()


def test_a_whole_recorded_forward_pass_reads_nothing_back(tiny_model: Callable[..., Any]) -> None:
    """Hooks and the way into the experts included: the model, its inputs and every default probe without values."""
    module = tiny_model("qwen3_moe", dtype="bfloat16", experts="grouped_mm")
    anatomy = ms.load(module).anatomy
    taps = [entry.function(ProbeContext(anatomy)) for entry in probes if entry.default]
    by_site = {site: probe for probe in taps for site in probe.sites(anatomy)}
    kept = {}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        ids = torch.ones(2, 6, dtype=torch.int64)
        mask = ids.bool()

        def receive(site: Site, tensors: dict[str, torch.Tensor]) -> None:
            kept[site] = by_site[site].tap(site, {**tensors, "mask": mask})

        with tapped(module, anatomy, list(by_site), receive):
            module(input_ids=ids, attention_mask=ids, use_cache=False)
    assert set(kept) == set(by_site)
    assert all(tensors for site, tensors in kept.items() if site.tensor != ROUTER_LOGITS)
