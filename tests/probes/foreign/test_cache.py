"""`run_with_cache`: what it holds, under which names, in which shapes; held against plain hooks on transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import moescope as ms
from moescope.core.errors import InputError
from moescope.core.sites import PATTERN, Site
from moescope.probes.foreign.cache import SiteCache, run_with_cache
from moescope.probes.live_model import LiveModel
from moescope.probes.taps import sites_of


@pytest.fixture
def live(tiny_model: Callable[..., Any]) -> LiveModel:
    return ms.load(tiny_model("qwen3_moe"))


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(5))


def test_tensors_are_those_of_plain_hooks(live: LiveModel, ids: torch.Tensor) -> None:
    layer: Any = live.module.get_submodule("model.layers.1")
    seen: dict[str, Any] = {}
    handles = [
        layer.register_forward_hook(lambda _m, _i, output: seen.update(stream=output)),
        layer.mlp.gate.register_forward_hook(lambda _m, _i, output: seen.update(router=output)),
        layer.mlp.experts.register_forward_pre_hook(lambda _m, given: seen.update(given=given)),
    ]
    with torch.no_grad():
        expected = live.module(input_ids=ids, use_cache=False).logits
        for handle in handles:
            handle.remove()
        logits, cache = run_with_cache(live, ids)
    assert torch.equal(logits, expected)
    assert torch.equal(cache["blocks.1.hook_resid_post"], seen["stream"])
    assert torch.equal(cache["blocks.1.mlp.hook_router_logits"], seen["router"][0].view(3, 9, -1))
    assert torch.equal(cache["blocks.1.mlp.hook_expert_indices"], seen["given"][1].view(3, 9, -1))
    assert torch.equal(cache["blocks.1.mlp.hook_expert_weights"], seen["given"][2].view(3, 9, -1))


def test_neurons_are_in_the_slots_that_they_belong_to(live: LiveModel, ids: torch.Tensor) -> None:
    with torch.no_grad():
        cache = run_with_cache(live, ids)[1]
    experts: Any = live.module.get_submodule("model.layers.0.mlp.experts")
    down = experts.down_proj[cache["expert_indices", 0]]  # [batch, position, k, d_model, d_expert]
    through = torch.einsum("bpkmn,bpkn->bpkm", down, cache["blocks.0.mlp.experts.hook_post"])
    torch.testing.assert_close(cache["blocks.0.mlp.experts.hook_out"], through, rtol=1e-5, atol=1e-5)


def test_every_site_is_cached_by_position_but_patterns(live: LiveModel, ids: torch.Tensor) -> None:
    cache = run_with_cache(live, ids)[1]
    known = sites_of(live.module, live.anatomy)
    assert cache.sites == [site for site in known if site.tensor != PATTERN]
    assert len(cache) >= 14
    assert all(tensor.shape[:2] == (3, 9) for tensor in cache.values())
    assert not any(tensor.requires_grad for tensor in cache.values())


@pytest.mark.parametrize(
    "name",
    ["blocks.1.hook_resid_post", "blocks.1.hook_out", ("resid_post", 1), ("resid_post", -1), "resid_post1",
     "model.layers.1", "model.layers[1].output[0]", Site(1, "", "hook_resid_post")],
)  # fmt: skip
def test_any_spelling_finds_the_tensor(name: Any, live: LiveModel, ids: torch.Tensor) -> None:
    cache = run_with_cache(live, ids, "blocks.1.hook_resid_post")[1]
    assert list(cache) == ["blocks.1.hook_resid_post"]
    assert name in cache
    assert cache[name] is cache["blocks.1.hook_resid_post"]


@pytest.mark.parametrize(
    ("names_filter", "expected"),
    [
        ("model.layers.0.mlp.gate", ["blocks.0.mlp.hook_router_logits"]),
        (["resid_pre1", "blocks.1.hook_in", ("router_logits", 0)],
         ["blocks.0.mlp.hook_router_logits", "blocks.1.hook_resid_pre"]),
        (lambda name: name.endswith("hook_resid_post"), ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]),
        (lambda _: False, []),
    ],
)  # fmt: skip
def test_a_filter_chooses_sites(names_filter: Any, expected: list[str], live: LiveModel, ids: torch.Tensor) -> None:
    assert list(run_with_cache(live, ids, names_filter)[1]) == expected


def test_rows_of_different_lengths_are_padded_and_masked(live: LiveModel) -> None:
    with torch.no_grad():
        logits, cache = run_with_cache(live, [[5, 6, 7, 8], [9, 10]])
        _, alone = run_with_cache(live, [9, 10])
    assert logits.shape[:2] == (2, 4)
    assert cache.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert alone.mask.shape == (1, 2)
    torch.testing.assert_close(cache["resid_post", 1][1, :2], alone["resid_post", 1][0])
    assert "2 positions" in repr(alone)


def test_texts_are_tokenised_by_the_models_own_tokenizer() -> None:
    live = ms.load("demo")
    cache = run_with_cache(live, ["Once upon a time", "There"], "resid_post0")[1]
    expected = [len(row) for row in live.tokenizer(["Once upon a time", "There"])["input_ids"]]
    assert cache.mask.sum(1).tolist() == expected


def test_the_cache_keeps_what_the_model_saw(live: LiveModel, ids: torch.Tensor) -> None:
    def doubled_in_place(_module: Any, given: Any) -> None:
        given[0].mul_(2)

    handle = live.module.get_submodule("model.layers.1").register_forward_pre_hook(doubled_in_place)
    with torch.no_grad():
        cache: SiteCache = run_with_cache(live, ids)[1]
        handle.remove()
        expected = run_with_cache(live, ids)[1]["resid_post", 0]
    assert torch.equal(cache["resid_post", 0], expected)
    assert torch.equal(cache["resid_pre", 1], 2 * expected)
    assert cache.to("cpu").sites == cache.sites


def test_what_was_not_cached_is_named(live: LiveModel, ids: torch.Tensor) -> None:
    cache = run_with_cache(live, ids)[1]
    assert ("pattern", 0) not in cache
    assert "nothing" not in cache
    assert 3 not in cache
    assert cache.get("blocks.0.attn.hook_pattern") is None
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.hook_pattern is not in this cache.*names_filter"):
        cache["pattern", 0]
    with pytest.raises(KeyError):
        cache["pattern", 0]
    with pytest.raises(InputError, match="did you mean"):
        cache["blocks.0.hook_resid_pst"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "has no tokenizer"),
        ([], "no tokens"),
        ([[5], []], "no tokens"),
        ([[5, 97]], r"ids from 0 to 96.*97"),
        ([-1], r"ids from 0 to 96"),
    ],
)
def test_bad_input_is_refused(text: Any, message: str, live: LiveModel) -> None:
    with pytest.raises(InputError, match=message):
        run_with_cache(live, text)


def test_a_site_of_another_model_is_refused(live: LiveModel, ids: torch.Tensor) -> None:
    with pytest.raises(InputError, match="no site"):
        run_with_cache(live, ids, "blocks.0.mlp.shared_expert.hook_out")
    with pytest.raises(InputError, match="no site"):
        run_with_cache(live, ids, "resid_post7")
