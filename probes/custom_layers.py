"""MoE layers of one's own: announced in a line, and recorded like any other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moescope.core.errors import InputError

Decision = Callable[[nn.Module, Any, Any], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class CustomLayer:
    """How to read a layer of the user's own; see `register_moe`."""

    decision: Decision
    n_experts: int | str
    top_k: int | str
    router: str | None


_REGISTERED: dict[type[nn.Module], CustomLayer] = {}


def register_moe(
    layer: type[nn.Module], decision: Decision, *, n_experts: int | str, top_k: int | str, router: str | None = None
) -> None:
    """Say how to read the routing of an MoE layer that is not one of transformers'.

    Args:
        layer: class of the layer; subclasses count.
        decision: called after the layer has run, with (layer, inputs, output); gives the expert ids and the weights that
            the layer used, both of shape [token, k] or [row, position, k]. It must not read anything back to the host.
        n_experts, top_k: numbers, or names of the layer's attributes that hold them.
        router: name of the layer's child whose output is the router's logits; None where there is none.

    Raises:
        InputError: something other than a module class.

    Example:
        >>> import torch
        >>> import moescope as ms
        >>> class MyMoE(torch.nn.Module):
        ...     last_ids: torch.Tensor
        ...     last_weights: torch.Tensor
        >>> ms.register_moe(MyMoE, lambda moe, inputs, output: (moe.last_ids, moe.last_weights), n_experts=8, top_k=2)
    """
    if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
        raise InputError(
            "register_moe takes a class of module", found=repr(layer), fix="pass the class, not an instance"
        )
    _REGISTERED[layer] = CustomLayer(decision, n_experts, top_k, router)


def custom_layer(module: nn.Module) -> CustomLayer | None:
    """How a module's routing is read, if its class was registered."""
    return next((_REGISTERED[kind] for kind in type(module).__mro__ if kind in _REGISTERED), None)
