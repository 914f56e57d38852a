"""Tiny models of several families, and passes written to be read: one whole pass an expert, weights zeroed by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

SWEPT = ("qwen3_moe", "olmoe", "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss")


@pytest.fixture(scope="session")
def swept_model(tiny_model: Callable[..., Any]) -> Callable[..., Any]:
    """`swept_model(family, **config)`: a tiny model, also of gpt_oss, whose layers alternate in their attention."""
    import torch
    import transformers

    def build(family: str, **config: Any) -> Any:
        if family != "gpt_oss":
            return tiny_model(family, **config)
        settings = transformers.GptOssConfig(
            vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
            intermediate_size=16, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64, sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )  # fmt: skip
        module = transformers.GptOssForCausalLM(settings).eval()
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in sorted(module.named_parameters()):
                drawn = torch.empty_like(parameter).normal_(generator=random)
                parameter.copy_(1 + 0.1 * drawn if "norm" in name else 0.3 * drawn)
        return module

    return build


@pytest.fixture(scope="session")
def by_hand() -> Callable[..., list[list[float]]]:
    """`by_hand(module, layer, expert, sequences)`: ΔNLL, KL and flips of each sequence, summed, from whole passes of one
    sequence each, the expert's down projection (and its bias) set to zero meanwhile."""
    import torch

    def run(module: Any, layer: int, expert: int, sequences: list[list[int]]) -> list[list[float]]:
        experts = module.model.layers[layer].mlp.experts
        names = [name for name, _ in experts.named_parameters() if name.startswith("down_proj")]
        base = [_logits(module, row) for row in sequences]
        kept = {name: getattr(experts, name).detach().clone() for name in names}
        with torch.no_grad():
            for name in names:
                getattr(experts, name)[expert] = 0
            cut = [_logits(module, row) for row in sequences]
            for name in names:
                getattr(experts, name).copy_(kept[name])
        found = []
        for row, before, after in zip(sequences, base, cut, strict=True):
            p, q = before.double().log_softmax(-1)[:-1], after.double().log_softmax(-1)[:-1]
            at = torch.tensor(row[1:])
            delta = (p - q).gather(-1, at[:, None]).sum()
            kl = (p.exp() * (p - q)).sum()
            flips = (p.argmax(-1) != q.argmax(-1)).sum()
            found.append([float(delta), float(kl), float(flips)])
        return found

    def _logits(module: Any, row: list[int]) -> Any:
        with torch.no_grad():
            return module(input_ids=torch.tensor([row]), use_cache=False).logits[0]

    return run
