"""nnsight models as live models, and live models in the hands of nnsight: the same module, the same numbers."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moescope as ms
from moescope.core.errors import InputError
from moescope.core.sites import EXPERT_INDICES, EXPERT_OUT, RESID_POST, Site
from moescope.probes.foreign import nnsight_models
from moescope.probes.foreign.cache import run_with_cache
from moescope.probes.foreign.trace import trace, wrapped
from moescope.probes.live_model import LiveModel
from moescope.probes.taps import tapped


@pytest.fixture
def nnsight() -> Any:
    return pytest.importorskip("nnsight", reason="nnsight is not installed")


@pytest.fixture
def live(tiny_model: Callable[..., Any]) -> LiveModel:
    return ms.load(tiny_model("qwen3_moe"))


@pytest.mark.parametrize("kind", ["NNsight", "LanguageModel", "TransformersModel"])
def test_the_module_inside_a_wrapper_is_loaded(
    kind: str, nnsight: Any, tiny_model: Callable[..., Any], word_tokenizer: Any
) -> None:
    module = tiny_model("olmoe")
    options = {} if kind == "NNsight" else {"tokenizer": word_tokenizer}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # LanguageModel is deprecated, and still what most people have
        loaded = ms.load(getattr(nnsight, kind)(module, **options))
    assert loaded.module is module
    assert (loaded.tokenizer is None) == (kind == "NNsight")
    assert ms.load(nnsight.NNsight(module), tokenizer=word_tokenizer).tokenizer is word_tokenizer


def test_a_wrapper_around_another_librarys_model_is_unwrapped_too(nnsight: Any, hooked: Callable[..., Any]) -> None:
    assert ms.load(nnsight.NNsight(hooked())).anatomy.architecture == "HookedTransformer"


def test_what_is_recorded_is_what_a_trace_saves(nnsight: Any, live: LiveModel, ids: torch.Tensor) -> None:
    model = nnsight.NNsight(live.module)
    with torch.no_grad(), model.trace(ids):
        stream = model.model.layers[0].output.save()
        router = model.model.layers[1].mlp.gate.output.save()
        given = model.model.layers[1].mlp.experts.inputs.save()
        out = model.model.layers[1].mlp.output.save()
        last = model.lm_head.output.save()
    with torch.no_grad():
        logits, cache = run_with_cache(live, ids)
    assert torch.equal(logits, last)
    for name, saved in (
        ("model.layers[0].output", stream),
        ("model.layers[1].mlp.gate.output[0]", router[0]),
        ("model.layers[1].mlp.experts.inputs[0][1]", given[0][1]),
        ("model.layers[1].mlp.experts.inputs[0][2]", given[0][2]),
        ("model.layers[1].mlp.output", out),
    ):
        assert torch.equal(cache[name].flatten(), saved.flatten()), name


def test_a_wrapper_without_weights_is_given_them(nnsight: Any, tiny_model: Callable[..., Any], tmp_path: Path,
                                                 word_tokenizer: Any) -> None:  # fmt: skip
    module = tiny_model("qwen3_moe")
    module.save_pretrained(tmp_path)
    wrapper = nnsight.TransformersModel(str(tmp_path), task="text-generation", tokenizer=word_tokenizer)
    assert not wrapper.dispatched
    loaded = ms.load(wrapper)
    assert wrapper.dispatched
    saved = module.state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.module.state_dict().items())
    assert loaded.tokenizer is word_tokenizer


def test_a_wrapper_whose_weights_are_gone_is_refused(nnsight: Any, tiny_model: Callable[..., Any], tmp_path: Path,
                                                     word_tokenizer: Any) -> None:  # fmt: skip
    tiny_model("olmoe").save_pretrained(tmp_path)
    wrapper = nnsight.TransformersModel(str(tmp_path), task="text-generation", tokenizer=word_tokenizer)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="cannot load the weights"):
        ms.load(wrapper)
    on_meta = nnsight.NNsight(tiny_model("llama").to("meta"))
    with pytest.raises(InputError, match="no weights in memory"):
        ms.load(on_meta)


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_a_trace_of_a_live_model_reads_its_own_module(
    with_tokenizer: bool, nnsight: Any, tiny_model: Callable[..., Any], word_tokenizer: Any, ids: torch.Tensor
) -> None:
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.padding_side = "right"
    live = ms.load(tiny_model("qwen3_moe"), tokenizer=tokenizer if with_tokenizer else None)
    with torch.no_grad():
        expected = run_with_cache(live, ids)[1]["resid_post", 0]
        with trace(live, ids):
            saved = wrapped(live).model.layers[0].output.save()
    assert torch.equal(saved, expected)
    assert wrapped(live) is wrapped(live)
    assert tokenizer.padding_side == "right"  # nnsight turns that of its own copy
    if with_tokenizer:
        with torch.no_grad(), trace(live, "w5 w6 w7"):
            of_text = wrapped(live).model.layers[0].output.save()
        assert of_text.shape[-1] == expected.shape[-1]


def test_taps_and_a_trace_see_the_same_at_once(nnsight: Any, live: LiveModel, ids: torch.Tensor) -> None:
    seen: dict[Site, dict[str, torch.Tensor]] = {}
    sites = [Site(0, "", RESID_POST), Site(1, "mlp", EXPERT_INDICES), Site(1, "mlp", EXPERT_OUT)]

    def receive(site: Site, tensors: dict[str, torch.Tensor]) -> None:
        seen[site] = {name: tensor.clone() for name, tensor in tensors.items()}

    with torch.no_grad():
        before = live.module(input_ids=ids, use_cache=False).logits
        with tapped(live.module, live.anatomy, sites, receive), trace(live, ids):
            stream = wrapped(live).model.layers[0].output.save()
            given = wrapped(live).model.layers[1].mlp.experts.inputs.save()
            last = wrapped(live).lm_head.output.save()
        after = live.module(input_ids=ids, use_cache=False).logits
    assert torch.equal(last, before)
    assert torch.equal(after, before)
    assert torch.equal(seen[sites[0]]["resid"], stream)
    assert torch.equal(seen[sites[1]]["indices"], given[0][1])
    assert seen[sites[2]]["out"].shape[:2] == given[0][1].shape


def test_an_edit_in_a_trace_is_seen_by_taps(nnsight: Any, live: LiveModel, ids: torch.Tensor) -> None:
    seen: dict[Site, torch.Tensor] = {}
    sites = [Site(1, "", "hook_resid_pre")]
    with (
        torch.no_grad(),
        tapped(live.module, live.anatomy, sites, lambda s, t: seen.update({s: t["resid"].clone()})),
        trace(live, ids),
    ):
        wrapped(live).model.layers[0].output[:] = 0
    assert not bool(seen[sites[0]].any())


def test_without_nnsight_the_extra_is_named(live: LiveModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nnsight_models.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(InputError, match=r"pip install .*moescope\[nnsight\]"):
        trace(live, [[5, 6]])


def test_loading_a_model_imports_neither_library(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("nnsight", "transformer_lens")]:
        monkeypatch.delitem(sys.modules, name)
    run_with_cache(ms.load(tiny_model("olmoe")), [[5, 6, 7]])
    assert not {"nnsight", "transformer_lens"} & set(sys.modules)
