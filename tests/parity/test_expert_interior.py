"""Inside the experts of every family: slots and neurons are what plain transformers computes, and nothing changes for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import moescope as ms
from moescope.probes.expert_slots import SlotTap, neurons_reachable, slots_tapped, why_unreachable
from moescope.probes.families.tiny import build_tiny, moe_model_types

IDS = torch.tensor([[5, 9, 13, 2, 7, 11, 3], [4, 8, 15, 16, 23, 42, 1]])
BACKENDS = ("grouped_mm", "batched_mm", "eager")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def built(model_type: str, dtype: torch.dtype) -> nn.Module:
    try:
        return build_tiny(model_type, dtype=dtype).eval()
    except Exception as error:  # noqa: BLE001  a type this machine cannot build has a test of its own
        pytest.skip(f"cannot be built here: {error}")


def experts_of(module: nn.Module) -> list[Any]:
    sublayers = ms.load(module).anatomy.moe
    found = {s.experts_path: module.get_submodule(s.experts_path) for s in sublayers if s.experts_path}
    return [experts for experts in found.values() if why_unreachable(experts) is None]


def backends_of(module: Any, experts: list[Any]) -> Iterator[str]:
    """Each implementation in turn, set on the model."""
    if not all(hasattr(type(e).forward, "__wrapped__") for e in experts):
        yield "as it is"
        return
    for backend in BACKENDS:
        module.set_experts_implementation(backend)
        yield backend


def logits_of(module: Any) -> torch.Tensor:
    with torch.no_grad():
        named = {"decoder_input_ids": IDS} if getattr(module.config, "is_encoder_decoder", False) else {}
        return module(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False, **named).logits


def seen_inside(module: Any, experts: list[Any], out: bool = True) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Logits under taps, and for each experts module what was handed over, what it was given, and what it gave."""
    seen: list[dict[str, Any]] = [{} for _ in experts]

    def noting(number: int) -> Callable[[nn.Module, Any, Any, Any], None]:
        return lambda _, args, kwargs, output: seen[number].update(
            hidden=(*args, *kwargs.values())[0].reshape(-1, output.shape[-1]),
            routed=output.reshape(-1, output.shape[-1]),
        )

    handles = [e.register_forward_hook(noting(n), with_kwargs=True) for n, e in enumerate(experts)]
    taps = [SlotTap(e, s.update, neurons=neurons_reachable(e), out=out) for e, s in zip(experts, seen, strict=True)]
    try:
        with slots_tapped(taps):
            return logits_of(module), seen
    finally:
        for handle in handles:
            handle.remove()


def down_projected(experts: Any, post: torch.Tensor, expert: int) -> torch.Tensor:
    """The down projection of one expert, by hand, in float64."""
    if hasattr(experts, "mlp"):  # DBRX holds all experts in one matrix
        return post.double() @ experts.mlp.w2.view(experts.num_experts, -1, experts.hidden_size)[expert].double()
    weight = experts.down_proj[expert].double()
    out = post.double() @ (weight if getattr(experts, "is_transposed", False) else weight.t())
    if getattr(experts, "has_bias", False):
        out = out + experts.down_proj_bias[expert].double()
    if getattr(experts, "has_post_expert_norm", False):
        out = experts.post_expert_norm(out.to(experts.down_proj.dtype)).double()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", moe_model_types())
def test_taps_inside_leave_logits_identical(model_type: str, dtype: torch.dtype) -> None:
    module = built(model_type, dtype)
    experts = experts_of(module)
    if not experts:
        pytest.skip("its experts are out of reach")
    for backend in backends_of(module, experts):
        plain = logits_of(module)
        for out in (True, False):
            tapped, seen = seen_inside(module, experts, out)
            assert all(seen), backend
            assert torch.equal(plain, tapped), backend


@pytest.mark.parametrize("model_type", moe_model_types())
def test_slots_and_neurons_are_each_experts_own(model_type: str) -> None:
    """Slots against the module run on one row and one expert at a time; neurons against the down projection's weights."""
    module = built(model_type, torch.float32)
    experts = experts_of(module)
    if not experts:
        pytest.skip("its experts are out of reach")
    for backend in backends_of(module, experts):
        _, seen = seen_inside(module, experts)
        for held, found in zip(experts, seen, strict=True):
            ids, weights, slots = found["indices"], found["weights"], found["out"]
            tokens, k = ids.shape
            total = (slots.double() * weights.unsqueeze(-1)).sum(1)
            torch.testing.assert_close(total, found["routed"].double(), **CLOSE, msg=backend)
            once = torch.tensor([[1, 0]], dtype=weights.dtype)  # LongCat's loop cannot run a single slot
            with torch.no_grad():
                for token in range(tokens):
                    for slot in range(k):
                        twice = ids[token : token + 1, slot : slot + 1].expand(1, 2)
                        alone = held.forward(found["hidden"][token : token + 1], twice, once)
                        torch.testing.assert_close(slots[token, slot], alone.reshape(-1), **CLOSE, msg=backend)
            if "computed" in found:
                assert torch.equal(found["computed"], slots.reshape(tokens * k, -1)[found["slot"]])
            assert sorted(found["slot"].tolist()) == sorted(set(found["slot"].tolist()))
            with_neurons = range(len(held.down_proj) if hasattr(held, "down_proj") else held.num_experts)
            flat = ids.reshape(-1)
            assert set(found["slot"].tolist()) == {n for n in range(tokens * k) if int(flat[n]) in with_neurons}
            for row, place in zip(found["post"], found["slot"].tolist(), strict=True):
                by_hand = down_projected(held, row, int(flat[place]))
                torch.testing.assert_close(slots.reshape(tokens * k, -1)[place].double(), by_hand, **CLOSE, msg=backend)
