"""Models and corpora that the benchmarks run on."""

from __future__ import annotations

from typing import Any

import torch

import moescope as ms

OLMOE_SHAPED: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": False,
    "max_position_embeddings": 1024,
    "eos_token_id": 1,
}


def olmoe_shaped(dtype: torch.dtype) -> Any:
    """A random OLMoE of 8 layers, 32 experts top-4, width 512: 118 M parameters, experts by grouped_mm."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    module = OlmoeForCausalLM(OlmoeConfig(**OLMOE_SHAPED)).to(dtype).eval()
    module.set_experts_implementation("grouped_mm")
    return module


def random_corpus(vocabulary: int, sequences: int, length: int) -> Any:
    """Sequences of random token ids, a fifth of them half as long."""
    random = torch.Generator().manual_seed(1)
    lengths = [length // 2 if number % 5 == 4 else length for number in range(sequences)]
    return ms.Corpus.from_token_ids([torch.randint(3, vocabulary, (n,), generator=random).tolist() for n in lengths])
