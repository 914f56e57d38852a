"""A tiny random model of every family with experts that the installed transformers can build.

Found by looking, not by a list: a family has experts where the module of its causal language model defines a class of
experts. What such a model needs to be tiny is data, in `moescope.probes.families.tiny_settings`.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moescope.core.errors import InputError
from moescope.probes.families.tiny_settings import CORRECTION, OWN, ROUTER_GAIN, SHARED

ENCODER_DECODER_TYPES = ("nllb-moe", "switch_transformers")

_EXPERTS_CLASS = re.compile(r"^class \w+(?:Experts|MoE)\(", re.MULTILINE)
_ROUTER = re.compile(r"Router|Gating|MoEV1Gate")
_FACTOR = re.compile(r"norm|scale|residual$")
_CORRECTION_BIAS = re.compile(r"score_correction_bias|expert_bias|balancing_biases")
_SPREAD = 0.2  # of weights: near 1 over the square root of the width, so that sizes neither grow nor vanish with depth
_EMBEDDING_SPREAD = 0.5  # tokens far enough apart that they are routed apart
_ROUTER_NORM = 2.0  # of a row of the router's weights, and so the standard deviation of logits: no sigmoid is saturated
_CORRECTION_LIMIT = 0.12  # moves a third of the choices and leaves no expert out


@cache
def moe_model_types() -> tuple[str, ...]:
    """Every causal-LM model type of the installed transformers that can have experts, sorted.

    A type counts where the module that defines its causal language model has a class named `…Experts` or `…MoE`. Of a
    model of several modalities and its text part, the text part counts alone.

    Example:
        >>> {"olmoe", "deepseek_v3", "llama4_text"} <= set(moe_model_types())
        True
    """
    found = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if _EXPERTS_CLASS.search(_source(name))]
    return tuple(sorted(name for name in found if _text_type(name) not in found))


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """The configuration of the tiny model of a type; arguments and errors are those of `build_tiny`.

    Example:
        >>> tiny_config("mixtral", num_local_experts=4).num_local_experts
        4
    """
    known_types = (*moe_model_types(), *ENCODER_DECODER_TYPES)
    if model_type not in known_types:
        near = difflib.get_close_matches(model_type, known_types, n=3) or ["olmoe", "deepseek_v3", "gpt_oss"]
        raise InputError(
            f"{model_type!r} is not a model type with experts",
            expected=f"one of the {len(known_types)} of transformers {transformers.__version__}",
            fix=f"the nearest are {', '.join(near)}",
        )
    config_class: Any = CONFIG_MAPPING[model_type]
    settings = {name: value for name, value in SHARED.items() if _takes(config_class, name)}
    if "kv_lora_rank" in settings:  # multi-head latent attention has a key head for each query head
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    settings |= OWN.get(model_type, {})
    for name in overrides:
        if name not in settings and not _takes(config_class, name):
            near = difflib.get_close_matches(name, _fields(config_class), n=3) or sorted(_fields(config_class))
            raise InputError(f"{config_class.__name__} has no setting {name!r}", fix=f"it has {', '.join(near)}")
    changed = {config_class.attribute_map.get(name, name) for name in overrides}  # a setting may have several names
    kept = {
        name: value for name, value in settings.items() if config_class.attribute_map.get(name, name) not in changed
    }
    return config_class(**copy.deepcopy(kept) | overrides)  # some configurations write into their lists


def build_tiny(model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> nn.Module:
    """A tiny random model of a type, in eval mode: vocabulary 97, width 32, 8 experts of which a token takes 2.

    Dense and sparse layers, and attention beside state-space or linear layers, stand side by side where the family mixes
    them. Every weight is drawn, and every bias that takes part in the router's choice, so that the choice is not the
    top-k of the logits where the family corrects it. The same seed gives the same model; torch's own generator is left
    as it was.

    Args:
        model_type: one of `moe_model_types()` or `ENCODER_DECODER_TYPES`.
        seed: of the generator that draws the weights.
        dtype: of the weights. As when transformers loads a model, those that a family keeps in float32 stay so.
        overrides: settings of the configuration. Lists by layer do not follow a changed number of layers: give them too.

    Raises:
        InputError: an unknown model type, or a setting its configuration does not have.

    Example:
        >>> model = build_tiny("olmoe")
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.shape
        torch.Size([1, 3, 97])
    """
    config = tiny_config(model_type, **overrides)
    auto: Any = AutoModelForSeq2SeqLM if model_type in ENCODER_DECODER_TYPES else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        model: nn.Module = auto.from_config(config, dtype=dtype).eval()
    _keep_in_float32(model)
    _draw_weights(model, torch.Generator().manual_seed(seed))
    return model


def _source(model_type: str) -> str:
    """Source of the module that defines the causal language model of a type, read without importing it."""
    class_name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    library: Any = transformers
    module = library._class_to_module[class_name]
    return Path(library.__path__[0], *module.split(".")).with_suffix(".py").read_text(encoding="utf-8")


def _text_type(model_type: str) -> str | None:
    """Model type of the text part, where a configuration is made of several."""
    return getattr(CONFIG_MAPPING[model_type].sub_configs.get("text_config"), "model_type", None)


def _fields(config_class: Any) -> list[str]:
    return [*config_class.__dataclass_fields__, *config_class.attribute_map]


@cache
def _takes(config_class: Any, name: str) -> bool:
    """Whether a configuration does something with a name: others it would keep as attributes that mean nothing."""
    if name in _fields(config_class) or hasattr(config_class, name):
        return True
    own = [c for c in config_class.__mro__ if c.__module__.startswith("transformers.models.")]
    return any(f'"{name}"' in inspect.getsource(c) for c in own)  # read from the keywords: names of older versions


@torch.no_grad()
def _draw_weights(model: Any, random: torch.Generator) -> None:
    """Draw every parameter, every correction bias and every hash table anew, in the order of their names."""
    model_type = model.config.model_type
    parameters = dict(model.named_parameters())
    for name, tensor in sorted([*parameters.items(), *model.named_buffers()], key=lambda pair: pair[0]):
        path = name.split(".")
        owners = [type(model.get_submodule(".".join(path[:depth]))).__name__ for depth in range(len(path))]
        drawn = torch.randn(tensor.shape, generator=random)
        if path[-1] == "tid2eid":  # expert ids by token id: distinct within a row
            scores = torch.rand(len(tensor), model.config.num_local_experts, generator=random)
            tensor.copy_(scores.argsort(-1)[:, : tensor.shape[1]])
        elif _CORRECTION_BIAS.search(name):  # bounded: a far outlier would take or leave all tokens
            limit = CORRECTION.get(model_type, _CORRECTION_LIMIT)
            tensor.copy_(limit * (2 * torch.rand(tensor.shape, generator=random) - 1))
        elif name not in parameters:
            continue  # rotary frequencies, decays, hashes of n-grams: not weights
        elif tensor.ndim < 2 and ("Norm" in owners[-1] or _FACTOR.search(path[-1])):
            tensor.copy_(tensor + 0.1 * drawn)  # from 1, or from 0 where the module adds the 1
        elif tensor.ndim == 2 and ("router" in name or any(map(_ROUTER.search, owners))):
            # rows of one length and of mean 0, so that no expert starves
            rows = functional.normalize(drawn - drawn.mean(-1, keepdim=True), dim=-1)
            tensor.copy_(_ROUTER_NORM * ROUTER_GAIN.get(model_type, 1.0) * rows)
        else:
            tensor.copy_((_EMBEDDING_SPREAD if "Embedding" in owners[-1] else _SPREAD) * drawn)


def _keep_in_float32(model: Any) -> None:
    """Turn the weights that a family keeps in float32 back to it, as loading a checkpoint would."""
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and any(f".{part}." in f".{name}." for part in kept):
            tensor.data = tensor.data.float()
