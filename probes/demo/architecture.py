"""The demo model's architecture and its two training losses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase, Qwen3MoeConfig, Qwen3MoeForCausalLM

IGNORED = -100
EMBEDDING_STD = 0.06


def demo_config(tokenizer: PreTrainedTokenizerBase) -> Qwen3MoeConfig:
    """Six layers of 16 experts, of which a token takes two: 6.7 million parameters, 2.1 million active.

    16 experts top-2 was chosen over 32 experts top-4 of half the width, equal in size and cost on paper, for
    the training speed measured on two CPU cores.
    """
    return Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=384,
        moe_intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,  # type: ignore[call-arg]  # taken by **kwargs
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        router_aux_loss_coef=0.05,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_model(config: Qwen3MoeConfig, *, seed: int) -> Qwen3MoeForCausalLM:
    """A freshly initialised float32 model; the eager expert loop trains fastest at this size on a CPU.

    Token embeddings start wider, and what attention and experts add to the residual starts narrower (by 1 /
    √(2 · layers)) than transformers draws them: at this width the default drowns the token in the first
    layers, and the first steps learned more slowly.
    """
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("eager")
    added_scale = (2 * config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(EMBEDDING_STD / config.initializer_range)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(added_scale)
            layer.mlp.experts.down_proj.mul_(added_scale)
    return model


def balance_loss(router_logits: tuple[Tensor, ...], *, top_k: int) -> Tensor:
    """The load-balancing loss of Switch Transformers (arXiv 2101.03961, eq. 4), by layer, then averaged.

    For one layer it is E · Σ_e f_e · p_e with f_e the share of (token, slot) pairs that chose expert e and
    p_e the mean router probability of e: 1 when balanced. transformers pools all layers before multiplying,
    so that opposite imbalances of two layers cancel; here they do not. `router_logits` holds ``[tokens,
    experts]`` for each layer.
    """
    losses = []
    for logits in router_logits:
        n_experts = logits.shape[-1]
        probabilities = logits.float().softmax(dim=-1)
        chosen = probabilities.topk(top_k, dim=-1).indices.flatten()
        share = torch.bincount(chosen, minlength=n_experts) / chosen.numel()
        losses.append(n_experts * (share * probabilities.mean(dim=0)).sum())
    return torch.stack(losses).mean()


def losses(model: Qwen3MoeForCausalLM, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean next-token NLL in nats and the balance loss on `rows` ``[batch, length]``.

    Predicting ``<bos>``, with which every row starts, is left out: where the next document begins is no
    property of the text.
    """
    config = model.config
    output = model.model(input_ids=rows, output_router_logits=True, use_cache=False)
    logits = model.lm_head(output.last_hidden_state[:, :-1])
    targets = rows[:, 1:].masked_fill(rows[:, 1:].eq(rows[:, :1]), IGNORED)
    nll = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    return nll, balance_loss(output.router_logits, top_k=config.num_experts_per_tok)
