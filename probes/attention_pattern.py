"""Attention probabilities beside whatever kernel computes attention, without changing it.

transformers asks `AttentionInterface.get_interface` for the function that computes attention, at every call, and hands over
the family's own eager function as the default. While patterns are tapped, what it returns is wrapped: the model's kernel
runs as before, on what it was given and for its own output. The pattern comes from the kernel itself where that is the
eager one; from scaled dot products (`sdpa`) it cannot come, so that the family's eager function computes it beside, in
float32, from the same queries, keys, mask, scale, soft cap and sinks. Whole, or in slices of queries
(`moescope.probes.attention_slices`).
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import nn

from moescope.core.errors import InputError, RunError
from moescope.probes.attention_slices import PatternSlices, SliceTap, additive, has_sinks, slices_beside

Pattern = Float[torch.Tensor, "row head query key"]
_TAPS, _SLICES = "_moescope_pattern_taps", "_moescope_slice_taps"
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


def patterns_tapped(taps: Iterable[tuple[nn.Module, Callable[[Pattern], None]]]) -> AbstractContextManager[None]:
    """Hand the attention pattern of each module to its receiver at every forward pass while the context lasts.

    Contexts may be nested, also of one module, and be on in several threads; after the last of them transformers is as it
    was.

    Raises:
        InputError: an attention implementation other than eager and sdpa, which does not show what is needed.
    """
    return _attached(_TAPS, list(taps))


def slices_tapped(taps: Iterable[tuple[nn.Module, SliceTap]]) -> AbstractContextManager[None]:
    """Hand the attention pattern of each module to its receiver in slices; otherwise as `patterns_tapped`.

    A receiver is called once a pass, after the kernel, and goes over the slices before it returns. Slices that nobody asks
    for are not computed.
    """
    return _attached(_SLICES, list(taps))


@contextmanager
def _attached(attribute: str, given: list[tuple[nn.Module, Any]]) -> Iterator[None]:
    for module, _ in given:
        _check(module)
    token = object()
    entered: list[tuple[nn.Module, Any]] = []
    try:
        _install(token)
        for module, function in given:
            setattr(module, attribute, (*getattr(module, attribute, ()), function))
            entered.append((module, function))
        yield
    finally:
        for module, function in entered:
            left = [other for other in getattr(module, attribute) if other is not function]
            setattr(module, attribute, tuple(left)) if left else delattr(module, attribute)
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
        taps, slice_taps = getattr(module, _TAPS, ()), getattr(module, _SLICES, ())
        if taps or slice_taps:
            pattern = _shown(implementation, output)
            if taps:
                whole = _beside(default, module, query, key, *args, **named) if pattern is None else pattern
                for tap in taps:
                    tap(whole)
            for slice_tap in slice_taps:
                if pattern is None or has_sinks(module, named):
                    slice_tap(slices_beside(default, module, query, key, *args, **named))
                else:
                    slice_tap(PatternSlices.of_whole(pattern))
        return output

    return attention


def _shown(implementation: str | None, output: Any) -> Pattern | None:
    """The pattern that the kernel itself gave; None where it gives none and one is made beside it."""
    if implementation not in _READABLE:
        raise RunError("the attention pattern of this pass cannot be read", found=f"{implementation!r}", fix=_FIX)
    pattern: Pattern | None = None if implementation == "sdpa" else output[1]
    return pattern


def _beside(
    eager: Callable[..., Any],
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    **named: Any,
) -> Pattern:
    """The pattern that the family's eager function gives for what the kernel was given, in float32."""
    rest = list(args)
    mask = rest.pop(0) if rest else named.pop("attention_mask", None)
    causal = named.pop("is_causal", None)
    causal = getattr(module, "is_causal", True) if causal is None else causal
    named["dropout"] = 0.0
    q, k = query.detach().float(), key.detach().float()
    # One column of values: the eager function's own product with them is not wanted, and as small as can be.
    v = value.detach()[..., :1].float()
    pattern: Pattern
    _, pattern = eager(module, q, k, v, additive(_mask(mask, q, k, causal), q), *rest, **named)
    return pattern


def _mask(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, causal: bool) -> torch.Tensor | None:
    """The mask that scaled dot products were given, or that they make by themselves."""
    queries, keys = query.shape[2], key.shape[2]
    if mask is not None or queries == 1 or not causal:
        return mask
    return torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()[None, None]
