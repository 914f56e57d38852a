"""Attention probabilities beside whatever kernel computes attention, without changing it.

transformers asks `AttentionInterface.get_interface` for the function that computes attention, at every call, and hands over
the family's own eager function as the default. While patterns are tapped, what it returns is wrapped: the model's kernel
runs as before, on what it was given and for its own output. The pattern comes from the kernel itself where that is the
eager one; from scaled dot products (`sdpa`) it cannot come, so that the family's eager function computes it beside, in
float32, from the same queries, keys, mask, scale, soft cap and sinks.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import nn

from moescope.core.errors import InputError, RunError

Pattern = Float[torch.Tensor, "row head query key"]
_TAPS = "_moescope_pattern_taps"
_METHOD = "get_interface"
_READABLE = ("eager", "sdpa", None)
_FIX = 'call model.set_attn_implementation("sdpa") (or "eager") before, or leave the attention pattern out'

_lock = threading.Lock()
_users: list[object] = []
_plain: list[Callable[..., Any]] = []


def asks_for_interface(attention: nn.Module) -> bool:
    """Whether a module asks transformers for its attention function, so that its pattern can be had beside it."""
    names = inspect.unwrap(type(attention).forward).__code__.co_names
    return "ALL_ATTENTION_FUNCTIONS" in names and "get_interface" in names


@contextmanager
def patterns_tapped(taps: Iterable[tuple[nn.Module, Callable[[Pattern], None]]]) -> Iterator[None]:
    """Hand the attention pattern of each module to its receiver at every forward pass while the context lasts.

    Contexts may be nested, also of one module, and be on in several threads; after the last of them transformers is as it
    was.

    Raises:
        InputError: an attention implementation other than eager and sdpa, which does not show what is needed.
    """
    taps = list(taps)
    for module, _ in taps:
        _check(module)
    token = object()
    entered: list[tuple[nn.Module, Callable[[Pattern], None]]] = []
    try:
        _install(token)
        for module, tap in taps:
            setattr(module, _TAPS, (*getattr(module, _TAPS, ()), tap))
            entered.append((module, tap))
        yield
    finally:
        for module, tap in entered:
            left = [other for other in getattr(module, _TAPS) if other is not tap]
            setattr(module, _TAPS, tuple(left)) if left else delattr(module, _TAPS)
        _uninstall(token)


def _check(module: nn.Module) -> None:
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if implementation not in _READABLE:
        raise InputError(
            "the attention pattern of this model cannot be read",
            expected="attention computed by sdpa or eager",
            found=f"the implementation {implementation!r}",
            fix=_FIX,
        )


def _install(token: object) -> None:
    from transformers.modeling_utils import AttentionInterface

    with _lock:
        if not _users:
            _plain[:] = [AttentionInterface.get_interface]
            setattr(AttentionInterface, _METHOD, _get_interface)
        _users.append(token)


def _uninstall(token: object) -> None:
    from transformers.modeling_utils import AttentionInterface

    with _lock:
        if token in _users:
            _users.remove(token)
            if not _users:
                # Left in `_plain`: another thread may be in `_get_interface` at this moment.
                setattr(AttentionInterface, _METHOD, _plain[0])


def _get_interface(interface: Any, implementation: str | None, default: Callable[..., Any]) -> Callable[..., Any]:
    kernel: Callable[..., Any] = _plain[0](interface, implementation, default)

    def attention(module: nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **named: Any) -> Any:
        output = kernel(module, query, key, *args, **named)
        taps = getattr(module, _TAPS, ())
        if taps:
            pattern = output[1] if implementation in ("eager", None) else None
            if pattern is None:
                pattern = _beside(implementation, default, module, query, key, *args, **named)
            for tap in taps:
                tap(pattern)
        return output

    return attention


def _beside(
    implementation: str | None,
    eager: Callable[..., Any],
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    **named: Any,
) -> Pattern:
    """The pattern that the family's eager function gives for what the kernel was given, in float32."""
    if implementation != "sdpa":
        raise RunError("the attention pattern of this pass cannot be read", found=f"{implementation!r}", fix=_FIX)
    rest = list(args)
    mask = rest.pop(0) if rest else named.pop("attention_mask", None)
    causal = named.pop("is_causal", None)
    causal = getattr(module, "is_causal", True) if causal is None else causal
    named["dropout"] = 0.0
    q, k = query.detach().float(), key.detach().float()
    # One column of values: the eager function's own product with them is not wanted, and as small as can be.
    v = value.detach()[..., :1].float()
    pattern: Pattern
    _, pattern = eager(module, q, k, v, _additive(mask, q, k, causal), *rest, **named)
    return pattern


def _additive(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, causal: bool) -> torch.Tensor | None:
    """What the eager function adds to the scores, from the mask that scaled dot products were given."""
    lowest = torch.finfo(query.dtype).min
    if mask is None:
        queries, keys = query.shape[2], key.shape[2]
        if queries == 1 or not causal:
            return None
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
    return mask.detach().to(query.dtype)
