"""The way into the experts: what is handed over, what is refused, and that nothing of it stays behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import moescope as ms
from moescope.probes.expert_slots import SlotTap, neurons_reachable, reachable, slots_tapped, why_unreachable
from moescope.probes.families.tiny import build_tiny
from moescope.probes.slot_reductions import neuron_counts, slot_norms

IDS = torch.tensor([[5, 9, 13, 2, 7, 11, 3, 8], [4, 8, 15, 16, 23, 42, 1, 6]])
BACKENDS = ("grouped_mm", "batched_mm", "eager")


def experts_of(module: Any) -> list[Any]:
    return [layer.mlp.experts for layer in module.model.layers if hasattr(layer.mlp, "experts")]


def taps_on(module: Any, receive: Callable[[dict[str, torch.Tensor]], None], **options: Any) -> list[SlotTap]:
    return [SlotTap(experts, receive, **options) for experts in experts_of(module)]


def logits(module: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return module(input_ids=ids, use_cache=False).logits


def state(module: nn.Module) -> dict[str, dict[str, int]]:
    """Every attribute of every instance, by identity."""
    return {name: {key: id(value) for key, value in vars(m).items()} for name, m in module.named_modules()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("first", BACKENDS)
@pytest.mark.parametrize("second", BACKENDS)
def test_taps_follow_the_implementation_at_each_call(
    first: str, second: str, dtype: str, tiny_model: Callable[..., Any]
) -> None:
    """As `generate` changes it on a GPU: by setting the configuration while the taps are on."""
    module, untouched = (tiny_model("olmoe", dtype=dtype, experts=first) for _ in range(2))
    seen: list[dict[str, Any]] = []
    with slots_tapped(taps_on(module, seen.append, neurons=True)):
        for backend in (first, second, first):
            seen.clear()
            for one in (module, untouched):
                one.config._experts_implementation = backend
            assert torch.equal(logits(module), logits(untouched))
            assert len(seen) == 2
            assert all({"out", "post", "slot"} <= set(found) for found in seen)


@pytest.mark.parametrize("model_type", ["gpt_oss", "olmoe", "deepseek_v4", "nemotron_h", "granitemoe"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_under_taps_are_the_models_own(model_type: str, backend: str) -> None:
    def gradients(tapped: bool) -> list[torch.Tensor]:
        module = build_tiny(model_type)
        module.set_experts_implementation(backend)  # type: ignore[operator]
        held = [module.get_submodule(s.experts_path) for s in ms.load(module).anatomy.moe if s.experts_path]
        seen: list[dict[str, Any]] = []
        with slots_tapped([SlotTap(e, seen.append, neurons=True) for e in held] if tapped else []):
            module(input_ids=IDS, use_cache=False).logits.square().sum().backward()
        assert bool(seen) == tapped
        return [p.grad for p in module.parameters() if p.grad is not None]

    plain, under_taps = gradients(False), gradients(True)
    assert len(plain) == len(under_taps) > 10
    for a, b in zip(plain, under_taps, strict=True):
        if backend == "batched_mm":  # its gathers add up gradients in whatever order threads come
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
def test_compiled_with_taps_equals_compiled_without(experts: str, tiny_model: Callable[..., Any]) -> None:
    module = tiny_model("qwen3_moe", dtype="bfloat16", experts=experts)
    seen: list[tuple[torch.Tensor, ...]] = []

    def receive(tensors: dict[str, torch.Tensor]) -> None:
        seen.append((tensors["post"].float().norm(), tensors["out"].float().norm(dim=-1)))

    def compiled() -> Any:
        torch._dynamo.reset()
        return torch.compile(module, fullgraph=True, backend="aot_eager")

    plain = logits(compiled())
    with slots_tapped(taps_on(module, receive, neurons=True)):
        tapped = logits(compiled())
    torch._dynamo.reset()
    assert len(seen) == 2
    assert torch.equal(plain, tapped)


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss"])
def test_generated_code_with_taps_equals_that_without(model_type: str, experts: str) -> None:
    """A compiler fuses, and rounds less than the model: taps must not make it round where it would not."""
    module: Any = build_tiny(model_type, dtype=torch.bfloat16)
    module.set_experts_implementation(experts)
    held = [module.get_submodule(s.experts_path) for s in ms.load(module).anatomy.moe if s.experts_path]
    seen: list[torch.Tensor] = []

    def receive(tensors: dict[str, torch.Tensor]) -> None:
        seen.append(slot_norms(tensors["computed"], tensors["slot"]))
        seen.append(neuron_counts(tensors["post"], tensors["slot"], tensors["indices"].numel(), 0.0)[0])

    def compiled() -> Any:
        torch._dynamo.reset()
        return torch.compile(module, fullgraph=True)

    plain = logits(compiled())
    with slots_tapped([SlotTap(e, receive, neurons=True, out=False) for e in held]):
        tapped = logits(compiled())
    torch._dynamo.reset()
    assert len(seen) == 2 * len(held)
    assert torch.equal(plain, tapped)


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_taps_run_where_tensors_have_no_values(family: str, experts: str, tiny_model: Callable[..., Any]) -> None:
    module = tiny_model(family, dtype="bfloat16", experts=experts)
    seen: list[dict[str, Any]] = []
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
        slots_tapped(taps_on(module, seen.append, neurons=True)),
    ):
        module(input_ids=torch.ones(2, 6, dtype=torch.int64), use_cache=False)
    k = module.config.num_experts_per_tok
    assert {tuple(found["out"].shape) for found in seen} == {(12, k, 32)}
    assert {tuple(found["post"].shape) for found in seen} == {(12 * k, 16)}
    assert {tuple(found["slot"].shape) for found in seen} == {(12 * k,)}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_every_instance_is_as_it_was(
    wrapped: bool, error: type[BaseException] | None, tiny_model: Callable[..., Any]
) -> None:
    """With a `forward` of its own on the instance, as accelerate puts one there, and without."""
    module = tiny_model("qwen3_moe")
    calls: list[int] = []
    if wrapped:
        for experts in experts_of(module):
            plain = experts.forward
            experts.forward = lambda *given, plain=plain: (calls.append(1), plain(*given))[1]
    plain_logits, before, expected = logits(module), state(module), 2 * len(calls)

    def receive(_: dict[str, torch.Tensor]) -> None:
        if error is not None:
            raise error("inside")

    if error is None:
        with slots_tapped(taps_on(module, receive, neurons=True)):
            assert torch.equal(logits(module), plain_logits)
        assert len(calls) == expected
    else:
        with pytest.raises(error), slots_tapped(taps_on(module, receive, neurons=True)):
            logits(module)
    assert state(module) == before
    assert torch.equal(logits(module), plain_logits)


def test_layers_that_accelerate_moves_are_read_where_they_run(tiny_model: Callable[..., Any]) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for backend in BACKENDS:
        module = tiny_model("qwen3_moe", experts=backend)
        plain = logits(module)
        for experts in experts_of(module):
            add_hook_to_module(experts, AlignDevicesHook(execution_device="cpu", io_same_device=False))
        before, seen = state(module), []
        with slots_tapped(taps_on(module, seen.append, neurons=True)):
            assert torch.equal(logits(module), plain)
        assert all("post" in found for found in seen)
        assert len(seen) == 2
        assert state(module) == before


def test_a_second_reader_is_refused_whatever_thread_it_is_in(tiny_model: Callable[..., Any]) -> None:
    module, refused = tiny_model("qwen3_moe"), []

    def second() -> None:
        try:
            with slots_tapped(taps_on(module, lambda _: None)):
                pass
        except ms.InputError as error:
            refused.append(str(error))

    before, plain, seen = state(module), logits(module), []
    with slots_tapped(taps_on(module, seen.append)[1:]):
        within = state(module)
        second()
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert state(module) == within, "the first module, which was free, is let go of again"
        assert torch.equal(logits(module), plain)
    assert [("already being recorded" in text) for text in refused] == [True, True]
    assert len(seen) == 1
    assert state(module) == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_passes_of_another_thread_are_not_read(backend: str, tiny_model: Callable[..., Any]) -> None:
    """Here one runs in the midst of each layer of a pass that is read; neither disturbs the other."""
    module, other = tiny_model("olmoe", experts=backend), IDS.flip(1)
    plain, plain_other, expected = logits(module), logits(module, other), []
    with slots_tapped(taps_on(module, expected.append, neurons=True)):
        logits(module)
    seen: list[dict[str, torch.Tensor]] = []
    given: list[torch.Tensor] = []

    def receive(tensors: dict[str, torch.Tensor]) -> None:
        seen.append(tensors)
        if threading.current_thread() is not threading.main_thread():
            return
        thread = threading.Thread(target=lambda: given.append(logits(module, other)))
        thread.start()
        thread.join()

    with slots_tapped(taps_on(module, receive, neurons=True)):
        assert torch.equal(logits(module), plain)
    assert len(seen) == len(expected) == 2
    for a, b in zip(seen, expected, strict=True):
        assert {name: torch.equal(tensor, b[name]) for name, tensor in a.items()} == dict.fromkeys(b, True)
    assert len(given) == 2
    assert all(torch.equal(found, plain_other) for found in given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_of_other_ranks_experts_do_no_harm(backend: str, tiny_model: Callable[..., Any]) -> None:
    """Under expert parallelism an id of `num_experts` or more stands for an expert elsewhere, with weight 0."""
    module = tiny_model("olmoe", experts=backend)
    experts = experts_of(module)[0]
    experts._is_expert_parallel = True
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 32, generator=random)
    ids = torch.stack([torch.randperm(9, generator=random)[:3] for _ in range(6)])
    ids[2], ids[3] = torch.tensor([8, 8, 8]), torch.tensor([0, 1, 2])
    weights = torch.rand(6, 3, generator=random).masked_fill(ids == 8, 0.0)
    found: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        plain = experts(hidden, ids, weights)
        with slots_tapped([SlotTap(experts, found.update, neurons=True)]):
            assert torch.equal(experts(hidden, ids, weights), plain)
        for token in range(6):
            for slot in range(3):
                if ids[token, slot] == 8:
                    continue
                own = experts(hidden[token : token + 1], ids[token : token + 1, slot : slot + 1], torch.ones(1, 1))
                torch.testing.assert_close(found["out"][token, slot], own[0], rtol=1e-5, atol=1e-5)
    here = {n for n, expert in enumerate(ids.flatten().tolist()) if expert < 8}
    assert here <= set(found["slot"].tolist())
    for row, place in zip(found["post"], found["slot"].tolist(), strict=True):
        if place in here:
            own = row @ experts.down_proj[ids.flatten()[place]].t()
            torch.testing.assert_close(found["out"].flatten(0, 1)[place], own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["olmoe", "mixtral", "deepseek_v3"])
def test_float32_weights_on_a_bfloat16_model_keep_the_output(
    family: str, backend: str, tiny_model: Callable[..., Any]
) -> None:
    module = tiny_model(family, dtype="bfloat16", experts=backend)
    experts = experts_of(module)[0]
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 32, generator=random).bfloat16()
    ids = torch.stack([torch.randperm(experts.num_experts, generator=random)[:3] for _ in range(40)])
    weights = torch.rand(40, 3, generator=random)
    with torch.no_grad():
        plain = experts(hidden, ids, weights)
        assert not torch.equal(plain, experts(hidden, ids, weights.bfloat16())), "the dtype of the weights must matter"
        with slots_tapped([SlotTap(experts, lambda _: None, neurons=True)]):
            assert torch.equal(experts(hidden, ids, weights), plain)


class OwnExperts(nn.Module):
    """A layer of one's own, which uses its weights in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Parameter(torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(1)))

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        slots = torch.einsum("td,tkde->tke", hidden, self.maps[ids])
        return torch.einsum("tke,tk->te", slots, weights)


def test_a_module_of_ones_own_is_read_by_a_run_of_single_slots() -> None:
    experts = OwnExperts()
    hidden, ids = torch.randn(5, 8), torch.tensor([[0, 1], [2, 3], [1, 0], [3, 3], [2, 0]])
    weights, found = torch.rand(5, 2), {}
    assert reachable(experts)
    assert not neurons_reachable(experts)
    with torch.no_grad():
        plain = experts(hidden, ids, weights)
        with slots_tapped([SlotTap(experts, found.update)]):
            assert torch.equal(experts(hidden, ids, weights), plain)
        for token, slot in [(t, s) for t in range(5) for s in range(2)]:
            torch.testing.assert_close(found["out"][token, slot], hidden[token] @ experts.maps[ids[token, slot]])
    with pytest.raises(ms.InputError, match="neurons"), slots_tapped([SlotTap(experts, found.update, neurons=True)]):
        pytest.fail("the context must not begin")


def test_an_implementation_of_somebody_elses_is_read_by_a_run_of_single_slots(
    tiny_model: Callable[..., Any],
) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

    def own(self: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return 1.0 * batched_mm_experts_forward(self, hidden, ids, weights)

    ALL_EXPERTS_FUNCTIONS.register("somebody_elses", own)
    try:
        module = tiny_model("olmoe")
        module.config._experts_implementation = "somebody_elses"
        plain, seen = logits(module), []
        with slots_tapped(taps_on(module, seen.append, neurons=True)):
            assert torch.equal(logits(module), plain)
        module.config._experts_implementation = "batched_mm"
        known = []
        with slots_tapped(taps_on(module, known.append)):
            logits(module)
    finally:
        del ALL_EXPERTS_FUNCTIONS._global_mapping["somebody_elses"]
    assert len(seen) == 2
    for a, b in zip(seen, known, strict=True):
        torch.testing.assert_close(a["out"], b["out"])
        assert "post" not in a, "neurons that are not seen are not made up"


def test_reasons_why_experts_are_out_of_reach(tiny_model: Callable[..., Any]) -> None:
    def reason(model_type: str, suffix: str) -> str | None:
        module = build_tiny(model_type)
        return why_unreachable(next(m for name, m in module.named_modules() if name.endswith(suffix)))

    assert "runs every expert" in (reason("llama4_text", "experts") or "")
    assert "sorted by expert" in (reason("jetmoe", "input_linear") or "")
    assert "mask over experts" in (reason("switch_transformers", "experts") or "")
    assert "mask over experts" in (reason("nllb-moe", "experts") or "")
    assert "does not take" in (why_unreachable(nn.Linear(2, 2)) or "")
    packed = experts_of(tiny_model("olmoe"))[0]
    assert why_unreachable(packed) is None
    packed.down_proj = nn.Parameter(packed.down_proj.to(torch.uint8), requires_grad=False)
    assert "quantised (uint8)" in (why_unreachable(packed) or "")
    assert not reachable(packed)
    assert not neurons_reachable(packed)
