"""From a model of another library to a live model; without importing that library."""

from __future__ import annotations

from typing import Any

from torch import nn

from moescope.core.errors import InputError
from moescope.probes.foreign.bridge import BridgedModel, is_wrapper, opened_bridge
from moescope.probes.foreign.hooked_transformer import HookedModel
from moescope.probes.foreign.nnsight_models import module_inside


def opened(model: Any, tokenizer: Any = None, *, moved: bool = False) -> tuple[Any, Any]:
    """A live model of a TransformerLens model; the module inside an nnsight wrapper; anything else as it is.

    Args:
        model: whatever was handed to `load`.
        tokenizer: to use instead of the library's own.
        moved: whether the caller asked for another device or type of weights.

    Returns:
        The model, and its tokenizer: the one given, or else the library's.

    Raises:
        InputError: a model of these libraries that is no causal language model or cannot be run here; or one of
            TransformerLens that should be moved, which only TransformerLens can do.
    """
    while is_from(model, "nnsight", "Envoy"):
        tokenizer = getattr(model, "tokenizer", None) if tokenizer is None else tokenizer
        model = module_inside(model)
    bridge = is_from(model, "transformer_lens", "TransformerBridge")
    hooked = is_from(model, "transformer_lens", "HookedTransformer")
    if not bridge and not hooked:
        if is_from(model, "transformer_lens", "HookedRootModule"):
            raise InputError(
                f"{type(model).__name__} is not a causal language model",
                expected="a HookedTransformer or a TransformerBridge",
            )
        if isinstance(model, nn.Module) and any(is_wrapper(m) for m in model.modules()):
            model = BridgedModel(model, tokenizer, name=type(model).__name__)  # a bridge was made of it before
        return model, tokenizer
    if moved:
        raise InputError(
            f"a {type(model).__name__} is recorded where it is and as it is",
            fix="move or convert it with its own .to() before, and leave device and dtype at auto",
        )
    return opened_bridge(model, tokenizer) if bridge else HookedModel(model, tokenizer), tokenizer


def is_from(model: Any, library: str, name: str) -> bool:
    """Whether one of a model's classes has this name and comes from this library."""
    return any(c.__name__ == name and c.__module__.partition(".")[0] == library for c in type(model).__mro__)
