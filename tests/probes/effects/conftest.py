"""A model made by hand in which one expert alone knows what follows a class of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

KNOWN = tuple(range(1, 7))  # after token t of these comes t + 1, and 1 after the last
OTHERS = tuple(range(7, 21))
EXPERTS = 8
KNOWING = 0


def make_knowing(module: Any) -> None:
    """Set every weight by hand: one layer, top-1 of eight experts, no attention.

    Tokens are one-hot. Expert 0 is chosen for the tokens of `KNOWN` and writes what follows; experts 1 to 7 share all other
    tokens and write nothing.
    """
    import torch

    vocabulary, width = module.lm_head.weight.shape
    layer = module.model.layers[0]
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        module.model.embed_tokens.weight[:, :vocabulary] = torch.eye(vocabulary)
        module.lm_head.weight[:, :vocabulary] = torch.eye(vocabulary)
        layer.mlp.gate.weight[KNOWING, list(KNOWN)] = 1.0
        for token in OTHERS:
            layer.mlp.gate.weight[1 + token % (EXPERTS - 1), token] = 1.0
        experts, neurons = layer.mlp.experts, layer.mlp.experts.down_proj.shape[-1]
        for neuron, token in enumerate(KNOWN):
            following = KNOWN[(neuron + 1) % len(KNOWN)]
            experts.gate_up_proj[KNOWING, neuron, token] = 1.0
            experts.gate_up_proj[KNOWING, neurons + neuron, token] = 1.0
            experts.down_proj[KNOWING, following, neuron] = 1.0
    assert width >= vocabulary


@pytest.fixture(scope="session")
def knowing_module() -> Any:
    """The model made by hand."""
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=24, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=16, moe_intermediate_size=8, num_experts=EXPERTS, num_experts_per_tok=1, norm_topk_prob=True,
        max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    module = transformers.Qwen3MoeForCausalLM(config).eval()
    make_knowing(module)
    return module


@pytest.fixture(scope="session")
def knowing_corpus() -> Any:
    """Twelve texts that run through the known tokens, and twelve of the others in random order."""
    import moescope as ms

    random = np.random.default_rng(0)
    known = [[KNOWN[(start + i) % len(KNOWN)] for i in range(int(random.integers(9, 14)))] for start in range(12)]
    others = [random.choice(OTHERS, int(random.integers(9, 14))).tolist() for _ in range(12)]
    return ms.Corpus.from_token_ids(known + others, labels=["known"] * 12 + ["others"] * 12)


@pytest.fixture
def ablate() -> Callable[..., Any]:
    """`ablate(layer, experts, how="zero", strength=1.0)`: an intervention of one edit."""
    from moescope.core.edit_kinds.experts import Ablate
    from moescope.core.intervention import Intervention

    def make(layer: Any, experts: Any, **options: Any) -> Any:
        return Intervention([Ablate(layer=layer, experts=experts, **options)])

    return make
