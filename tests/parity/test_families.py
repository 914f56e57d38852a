"""Families beyond the five of tests/conftest.py, each in tiny form: recorded exactly, or refused with the reason."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moescope as ms

# Names differ from family to family; a configuration passes over those it does not know.
TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# What is different about each: biases and interleaved weights, biased choice, no gate, mixed layers, shared experts, …
RECORDED = [
    "gpt_oss",
    "granitemoe",
    "granitemoeshared",
    "ernie4_5_moe",
    "glm4_moe",
    "deepseek_v2",
    "dots1",
    "glm_moe_dsa",
    "minimax_m2",
    "phimoe",
    "flex_olmo",
    "qwen3_next",
    "jamba",
    "nemotron_h",
    "qwen3_5_moe_text",
    "cohere2_moe",
]
REFUSED = ["llama4_text", "jetmoe", "doge"]


def build(family: str) -> Any:
    config = CONFIG_MAPPING[family](**TINY)
    module = AutoModelForCausalLM.from_config(config).eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            drawn = torch.empty_like(parameter).normal_(generator=random)
            parameter.copy_(1 + 0.1 * drawn if parameter.ndim == 1 and "norm" in name else 0.2 * drawn)
    return module


def watch_experts(module: Any) -> dict[str, tuple[list[list[int]], list[list[float]]]]:
    """Experts' module name → ids and weights last given to its `forward`, noted by a wrapper."""
    given: dict[str, tuple[list[list[int]], list[list[float]]]] = {}
    for name, experts in module.named_modules():
        if name.rsplit(".", 1)[-1] == "experts":
            plain = experts.forward

            def noting(*args: Any, name: str = name, plain: Any = plain, **kwargs: Any) -> Any:
                _, ids, weights = [*args, *kwargs.values()][:3]
                given[name] = ids.tolist(), weights.float().tolist()
                return plain(*args, **kwargs)

            experts.forward = functools.wraps(plain)(noting)
    return given


@pytest.mark.parametrize("family", RECORDED)
def test_a_family_is_recorded_exactly_with_its_logits_untouched(
    family: str, token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    module, (sequence,) = build(family), token_ids((11,))
    ids = torch.tensor([sequence])
    with torch.no_grad():
        plain = module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    last: list[Any] = []
    forward, given = module.forward, watch_experts(module)

    def noting(**kwargs: Any) -> Any:
        output = forward(**kwargs)
        last[:] = [output.logits.clone()]
        return output

    module.forward = noting
    run = record_ids(module, [sequence])
    assert run.status == "complete"
    assert torch.equal(last[0], plain)
    sublayers = ms.load(module).anatomy.moe
    assert {s.experts_path for s in sublayers} == set(given)
    for s in sublayers:
        query = """
            SELECT experts, weights FROM routing WHERE run_id = ? AND layer = ? AND block = ? ORDER BY token
        """
        stored = run.store.fetch(query, [run.run_id, s.layer, s.block])
        pairs = [list(zip(*slots, strict=True)) for slots in zip(*given[str(s.experts_path)], strict=True)]
        expected = [sorted(slots, key=lambda slot: (-slot[1], slot[0])) for slots in pairs]
        assert [list(zip(*row, strict=True)) for row in stored] == expected
        assert {len(slots) for slots in expected} == {s.top_k}


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_whose_experts_cannot_be_reached_is_refused(family: str) -> None:
    with pytest.raises(ms.InputError, match=r"experts that moescope cannot reach.*What to do"):
        ms.load(build(family))
