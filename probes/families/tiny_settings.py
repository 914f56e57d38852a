"""Settings of the tiny models, as data: one dictionary of names that every family draws on, and what a family needs of its own.

The sizes are the smallest that still show everything a family can do: three layers of which the first is dense, eight
experts of which two are taken, four groups of two, windows and index sizes shorter than a test's sequences.
"""

from __future__ import annotations

from typing import Any

# Names differ from family to family; each takes those that its configuration knows.
SHARED: dict[str, Any] = {
    "vocab_size": 97,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "max_position_embeddings": 256,
    # neurons of a dense MLP and of one expert: unequal where the family lets them be
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    # experts
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "shared_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    # a factor other than 1, so that a rule that forgets it is seen to be wrong
    "routed_scaling_factor": 2.5,
    "router_scaling_factor": 2.5,
    "route_scale": 2.5,
    "moe_routed_scaling_factor": 2.5,
    # the first layer dense, the others sparse
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "mlp_only_layers": [0],
    "moe_layer_start_index": 1,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    # attention; multi-head latent attention refuses fewer key heads than query heads, see `families.tiny`
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 8,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 4,
    "index_head_dim": 8,
    "index_n_heads": 16,  # with few, all their ReLUs are 0 for several keys, and ties make the choice a matter of width
    # every second layer of the other kind, where a number says so
    "global_attn_every_n_layers": 2,
    "sliding_window_pattern": 2,
    "full_attention_interval": 2,
    "layer_group_size": 2,
    # linear attention and state-space layers
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_d_state": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_chunk_size": 4,
    "ssm_state_size": 8,
    "chunk_size": 4,
}

_SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_LINEAR = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_HYBRID = {"layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"]}
_INKLING: dict[str, Any] = {
    **_HYBRID,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "rel_extent": 16,  # relative positions: 1,024 of them by default
    "unpadded_vocab_size": 97,
}

# model type → what it needs besides, or instead of, the shared settings
OWN: dict[str, dict[str, Any]] = {
    # the last layer must be of full attention
    "beam": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    # logits are divided by 16 by default
    "cohere2_moe": {"logit_scale": 1.0},
    # nested configurations; without a clip the attention crashes, and no rope_theta is set by default
    "dbrx": {
        "d_model": 32,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2},
    },
    # groups count under this method only
    "deepseek_v2": {"topk_method": "group_limited_greedy"},
    # its own names of layers: ids from a hash table of tokens in the first, a router in the others
    "deepseek_v4": {
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "layer_types": ["sliding_attention", "heavily_compressed_attention", "compressed_sparse_attention"],
        "head_dim": 16,  # twice the rotary part
        "o_groups": 2,
        "o_lora_rank": 8,
        "compress_rate_hca": 8,  # shorter than a test's sequences
        "hc_mult": 2,
    },
    # dense by default; product keys reach only a square number of experts
    "doge": {"is_moe": True, "num_experts": 9},
    # sliding from this layer on
    "dots1": {"max_window_layers": 2},
    # the sliding layers have sizes of their own
    "dots3_note_text": {
        "head_dim": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 8,
    },
    "flint": _SLIDING,
    # dense by default; embeddings for each layer; heads of another width in the last layer, of full attention
    "gemma4_text": {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "enable_moe_block": True,
        "vocab_size_per_layer_input": 97,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 16,
    },
    # state-space layers only by default, which `generate` does not take
    "granitemoehybrid": _LINEAR,
    # by default stretched 32 times from a context far longer than ours
    "gpt_oss": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 8,
        }
    },
    "inkling2_text": _INKLING,
    # shared experts take part in the normalisation: two show the order; logits are divided by 24 by default
    "inkling_text": {**_INKLING, "n_shared_experts": 2, "logits_mup_width_multiplier": 1.0},
    # experts in every second layer: a fourth layer has them beside attention
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 3},
    "kimi_linear": _LINEAR,
    "kolibri1": _SLIDING,
    "laguna": _SLIDING,
    # no default for the kinds of layers
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "llama4_text": {
        "moe_layers": [1, 2],
        "intermediate_size_mlp": 24,
        "no_rope_layer_interval": 2,
        "attention_chunk_size": 8,
    },
    # counts attention, two in each of its layers; two experts that compute nothing
    "longcat_flash": {"num_hidden_layers": 4, "zero_expert_num": 2},
    "mellum": _SLIDING,
    "minimax": {"block_size": 4},
    "minimax_m3_vl_text": {
        "dense_intermediate_size": 24,
        "layer_types": ["full_attention", "minimax_m3_sparse", "full_attention"],
        "index_n_heads": 2,  # one for each key head
        "index_block_size": 4,
        "index_topk_blocks": 2,
        "rotary_dim": 4,
    },
    "nllb-moe": {
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
    },
    # hashed n-grams in the first layer, chosen blocks of keys in the second
    "qwen4_exp_text": {
        "hc_lowrank": 8,
        "ple_layer_ids": [1],
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 4,
        "split_ngram_parts": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "switch_transformers": {
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "d_ff": 24,
        "d_kv": 8,
    },
    # refuses more than one expert a token
    "zaya": {**_HYBRID, "num_experts_per_tok": 1, "router_hidden_size": 16},
}

# model type → factor on the router's weights, where logits would lie closer together than elsewhere
ROUTER_GAIN: dict[str, float] = {
    "axk2": 2.0,  # its norms are gated
    "gemma4_text": 5.0,  # divides by the square root of the width
    "qwen4_exp_text": 2.0,  # its norms are gated
}

# model type → largest bias added to the scores before the choice, where 0.12 would move it too much or too little
CORRECTION: dict[str, float] = {
    "ernie4_5_moe": 0.07,  # scores are a softmax, smaller than sigmoids
    "kolibri1": 0.5,  # scores are the logits themselves
    "longcat_flash": 0.07,
    "zaya": 0.15,  # one expert a token: only the largest of the scores counts
}
