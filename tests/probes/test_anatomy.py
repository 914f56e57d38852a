"""What `find_anatomy` says of a model against what its configuration says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import moescope as ms
from moescope.probes.anatomy import find_anatomy

MOE = {
    # experts, top-k, neurons of an expert, shared experts, MoE layers, layers; as written in tests/conftest.py
    "qwen3_moe": (8, 2, 16, 0, [0, 1], 2),
    "olmoe": (8, 3, 16, 0, [0, 1], 2),
    "mixtral": (4, 2, 24, 0, [0, 1], 2),
    "qwen2_moe": (6, 2, 16, 1, [0, 1], 2),
    "deepseek_v3": (8, 3, 16, 1, [1, 2], 3),
}


@pytest.mark.parametrize("family", MOE)
def test_anatomy_of_a_moe_is_that_of_its_configuration(family: str, tiny_model: Callable[..., Any]) -> None:
    module = tiny_model(family)
    n_experts, top_k, d_expert, n_shared, moe_layers, n_layers = MOE[family]
    anatomy = find_anatomy(module)
    assert (anatomy.n_layers, anatomy.d_model, anatomy.vocabulary, anatomy.context) == (n_layers, 32, 97, 64)
    assert (anatomy.moe_layers, anatomy.n_experts, anatomy.top_k) == (moe_layers, n_experts, top_k)
    assert anatomy.parameters == module.num_parameters()
    assert anatomy.architecture == type(module).__name__
    for sublayer in anatomy.moe:
        assert (sublayer.n_experts, sublayer.top_k, sublayer.d_expert) == (n_experts, top_k, d_expert)
        assert (sublayer.n_shared, sublayer.n_null, sublayer.block) == (n_shared, 0, "mlp")
        block = module.model.layers[sublayer.layer].mlp
        assert module.get_submodule(sublayer.path) is block
        assert module.get_submodule(sublayer.experts_path) is block.experts
        assert module.get_submodule(sublayer.router_path) is block.gate


def test_the_dense_layers_of_a_moe_are_dense(tiny_model: Callable[..., Any]) -> None:
    anatomy = find_anatomy(tiny_model("deepseek_v3"))
    (dense,) = [s for s in anatomy.sublayers if s.kind == "dense"]
    assert (dense.layer, dense.block, dense.d_expert) == (0, "mlp", 48)
    assert (dense.n_experts, dense.top_k, dense.router_path) == (None, None, None)
    assert [s.layer for s in anatomy.sublayers if s.kind == "attention"] == [0, 1, 2]


@pytest.mark.parametrize(("family", "neurons"), [("llama", 48), ("gpt2", 128)])
def test_a_dense_model_has_no_experts(family: str, neurons: int, tiny_model: Callable[..., Any]) -> None:
    anatomy = find_anatomy(tiny_model(family))
    assert (anatomy.moe, anatomy.moe_layers, anatomy.n_experts, anatomy.top_k) == ((), [], None, None)
    assert [(s.layer, s.d_expert) for s in anatomy.sublayers if s.kind == "dense"] == [(0, neurons), (1, neurons)]


def test_block_paths_are_the_blocks_in_order(tiny_model: Callable[..., Any]) -> None:
    module = tiny_model("llama", num_hidden_layers=12)  # 10 would sort before 2 by name
    paths = find_anatomy(module).block_paths
    assert [module.get_submodule(path) for path in paths] == list(module.model.layers)


def test_the_layers_table_holds_the_anatomy(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    run = record_ids(tiny_model("deepseek_v3"), token_ids((4,)))
    columns = "layer, block, stack, kind, n_experts, top_k, n_shared, n_null, d_expert"
    rows = run.store.fetch(f"SELECT {columns} FROM layers WHERE run_id = ? ORDER BY layer, block", [run.run_id])
    attention = ("attn", "decoder", "attention", None, None, None, None, None)
    assert rows == [
        (0, *attention),
        (0, "mlp", "decoder", "dense", None, None, None, None, 48),
        (1, *attention),
        (1, "mlp", "decoder", "moe", 8, 3, 1, 0, 16),
        (2, *attention),
        (2, "mlp", "decoder", "moe", 8, 3, 1, 0, 16),
    ]
    assert run.info["anatomy"]["n_layers"] == 3
    assert run.info["architecture"] == "DeepseekV3ForCausalLM"


def test_anatomy_reads_as_text_and_as_a_table(tiny_model: Callable[..., Any]) -> None:
    anatomy = find_anatomy(tiny_model("deepseek_v3"))
    assert "DeepseekV3ForCausalLM: 3 layers" in str(anatomy)
    assert "1–2" in str(anatomy)
    assert anatomy._repr_html_().count("<tr>") == 4  # heads; attention; dense; MoE


def test_the_anatomy_of_a_live_model_does_not_depend_on_its_dtype(tiny_model: Callable[..., Any]) -> None:
    one, two = (ms.load(tiny_model("qwen3_moe", dtype=dtype)).anatomy for dtype in ("float32", "bfloat16"))
    assert one == two


def test_two_models_that_share_a_module_are_each_found(tiny_model: Callable[..., Any]) -> None:
    """A block used twice is one block: its name is known once."""
    module = tiny_model("llama")
    module.model.layers = torch.nn.ModuleList([module.model.layers[0], module.model.layers[0]])
    assert len(find_anatomy(module).block_paths) == 1
