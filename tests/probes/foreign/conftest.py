"""Tiny models in the hands of the other libraries; a test that asks for one is skipped where its library is absent."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def word_tokenizer() -> Any:
    """A tokenizer of 97 words `w0` … `w96`, which needs no file."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(97)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "w1", "eos_token": "w2", "pad_token": "w2"}
    # With these two TransformerLens does not look for the tokenizer on a hub.
    return PreTrainedTokenizerFast(tokenizer_object=words, **special, name_or_path="", add_bos_token=True)


_SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
OTHER_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("Gemma2Config", {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "granite": ("GraniteConfig", {"residual_multiplier": 0.5, "attention_multiplier": 0.3}),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gpt_oss": (
        "GptOssConfig",
        {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
    ),
    "jamba": (
        "JambaConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
         "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4,
         "use_mamba_kernels": False},
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def any_model(tiny_model: Callable[..., Any]) -> Callable[..., Any]:
    """`any_model(family, **config)`: as `tiny_model`, of more families."""
    import transformers

    def build(family: str, **config: Any) -> Any:
        if family not in OTHER_FAMILIES:
            return tiny_model(family, **config)
        config_class, own = OTHER_FAMILIES[family]
        without = ("num_key_value_heads",) if family in ("bloom", "gpt_neox") else ()
        sizes = {name: value for name, value in _SIZES.items() if name not in without}
        settings = getattr(transformers, config_class)(**sizes, **own, **config)
        module = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager").eval()
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in sorted(module.named_parameters()):
                parameter.normal_(std=0.2, generator=random).add_(1.0 if "norm" in name else 0.0)
        return module

    return build


@pytest.fixture(scope="session")
def bridge(any_model: Callable[..., Any], word_tokenizer: Any) -> Callable[..., Any]:
    """`bridge(family, mode=None)`: a TransformerBridge around `any_model(family)`; `mode` is that of its compatibility."""
    lens = pytest.importorskip("transformer_lens.model_bridge", reason="TransformerLens is not installed")

    def build(family: str, mode: str | None = None, **config: Any) -> Any:
        module = any_model(family, **config)
        module.config.architectures = [type(module).__name__]
        found = lens.TransformerBridge.boot_transformers(
            "tiny", hf_model=module, tokenizer=word_tokenizer, device="cpu"
        )
        if mode is not None:
            found.enable_compatibility_mode(disable_warnings=True, no_processing=mode == "unprocessed")
        return found

    return build


@pytest.fixture(scope="session")
def hooked() -> Callable[..., Any]:
    """`hooked(**config)`: a HookedTransformer with seeded weights, gated, with rotary positions and grouped heads."""
    lens = pytest.importorskip("transformer_lens", reason="TransformerLens is not installed")

    def build(**config: Any) -> Any:
        settings: dict[str, Any] = {
            "n_layers": 2, "d_model": 16, "n_ctx": 32, "d_head": 4, "n_heads": 4, "d_mlp": 24, "d_vocab": 97,
            "act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS", "positional_embedding_type": "rotary",
            "rotary_dim": 4, "n_key_value_heads": 2, "device": "cpu", "model_name": "hooked", **config,
        }  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it is to go in TransformerLens 4
            model = lens.HookedTransformer(lens.HookedTransformerConfig(**settings))
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                drawn = torch.empty_like(parameter).normal_(generator=random)
                last = name.rpartition(".")[2]
                # Large biases would make every token alike, and the decisions with them.
                parameter.copy_(1 + 0.1 * drawn if last == "w" else (0.03 if last[0] == "b" else 0.3) * drawn)
        return model.eval()

    return build


@pytest.fixture
def ids() -> torch.Tensor:
    """Token ids [3, 9]."""
    return torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(5))
