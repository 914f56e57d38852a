"""A TransformerLens `TransformerBridge`: the transformers model inside it, recorded as the bridge runs it.

The bridge puts its own wrappers around the modules of the transformers model, in place, and computes attention itself.
Routers and experts inside it are those of transformers. So routers and experts are tapped as ever, and the stream,
attention and dense neurons through the bridge's hook points, behind which the model goes on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from moescope.core.sites import (
    ATTN_OUT,
    DENSE_POST,
    HEAD_K,
    HEAD_Q,
    HEAD_V,
    HEAD_Z,
    MLP_IN,
    MLP_OUT,
    PATTERN,
    RESID_POST,
    RESID_PRE,
    Site,
)
from moescope.probes.anatomy import Anatomy, find_anatomy
from moescope.probes.foreign.taps import ForeignTaps, Point
from moescope.probes.live_model import LiveModel

_ORIGINAL = "_original_component"
_OTHER_MIXERS = ("linear_attn", "mamba", "mixer", "ssm")
_HEADS = {HEAD_Q: "q", HEAD_K: "k", HEAD_V: "v", HEAD_Z: "z"}


class BridgedModel(LiveModel):
    """A transformers model that a TransformerBridge has wrapped.

    Args:
        module: the bridge's `original_model`, on the weights it has, with or without the bridge's compatibility mode.
        tokenizer: None where there is none.
        name: what was loaded.
        weights_processed: whether the bridge has folded or centred weights; None where that is not known.
    """

    def __init__(self, module: nn.Module, tokenizer: Any, *, name: str, weights_processed: bool | None = None) -> None:
        self._weights_processed = weights_processed
        super().__init__(module, tokenizer, name=name)

    @cached_property
    def anatomy(self) -> Anatomy:
        """What the model is made of, below the bridge's wrappers."""
        return bridged_anatomy(self.module)

    def settings(self) -> dict[str, Any]:
        """What decides the numbers besides weights and text: also what the bridge has done to the weights."""
        return super().settings() | {
            "library": "transformer_lens.TransformerBridge",
            "attention": "transformer_lens",
            "weights_processed": self._weights_processed,
        }


def opened_bridge(bridge: Any, tokenizer: Any = None) -> BridgedModel:
    """A bridge as a live model, with the bridge's own tokenizer where none is given."""
    module = bridge.original_model
    return BridgedModel(
        module,
        bridge.tokenizer if tokenizer is None else tokenizer,
        name=str(getattr(bridge.cfg, "model_name", "") or type(module).__name__),
        weights_processed=bool(getattr(bridge, "_weights_processed", False)),
    )


def is_wrapper(module: nn.Module) -> bool:
    """Whether a bridge has put this module around another."""
    return type(module).__module__.startswith("transformer_lens.") and _ORIGINAL in module._modules


def bridged_anatomy(model: nn.Module) -> Anatomy:
    """The anatomy of a model that a bridge has wrapped: that of the same modules without the wrappers.

    Routers and experts stand in it where they are, inside their wrappers. Blocks, attention and dense MLPs stand as their
    wrappers, which compute in the place of what they wrap.
    """
    places: dict[str, str] = {}
    anatomy = find_anatomy(_unwrapped(model, "", "", places))

    def inside(path: str | None) -> str | None:
        return None if path is None else places[path]

    def outside(path: str) -> str:
        place = places[path]
        while place.endswith("." + _ORIGINAL):
            place = place.removesuffix("." + _ORIGINAL)
        return place

    sublayers = tuple(
        replace(
            s,
            path=places[s.path] if s.kind == "moe" else outside(s.path),
            router_path=inside(s.router_path),
            experts_path=inside(s.experts_path),
            logits_path=inside(s.logits_path),
        )
        for s in anatomy.sublayers
    )
    return replace(anatomy, block_paths=tuple(map(outside, anatomy.block_paths)), sublayers=sublayers)


def _unwrapped(module: nn.Module, plain: str, place: str, places: dict[str, str]) -> nn.Module:
    """A copy of a tree of modules without wrappers, weights shared; `places` gets plain path → path in the model."""
    while is_wrapper(module):
        inner = module._modules[_ORIGINAL]
        assert inner is not None
        module, place = inner, f"{place}.{_ORIGINAL}"
    places[plain] = place
    view = copy.copy(module)
    view._modules = {
        name: None
        if child is None
        else _unwrapped(child, f"{plain}.{name}".lstrip("."), f"{place}.{name}".lstrip("."), places)
        for name, child in module._modules.items()
    }
    return view


def bridge_taps(model: nn.Module, anatomy: Anatomy) -> ForeignTaps | None:
    """Taps of a transformers model that a bridge has wrapped; None for a model that none has."""
    blocks = [model.get_submodule(path) for path in anatomy.block_paths]
    if not blocks or not all(is_wrapper(block) for block in blocks):
        return None
    found = (pair for layer, block in enumerate(blocks) for pair in _points(layer, block, anatomy))
    return ForeignTaps(dict(found), whole=False)


def _points(layer: int, block: nn.Module, anatomy: Anatomy) -> Iterator[tuple[Site, Point]]:
    for tensor in (RESID_PRE, RESID_POST):
        if (point := _hook_point(block, tensor)) is not None:
            yield Site(layer, "", tensor), Point(point, "resid", _as_it_is)
    for tensor in (ATTN_OUT, MLP_OUT):
        if (added := _added(block, tensor)) is not None:
            yield Site(layer, "", tensor), added
    kinds = {s.block: s.kind for s in anatomy.sublayers if s.layer == layer}
    attention, mlp = block._modules.get("attn"), block._modules.get("mlp")
    if attention is not None and "attn" in kinds and _is_a(attention, "AttentionBridge"):
        yield from ((Site(layer, "attn", tensor), found) for tensor, found in _head_points(attention).items())
    if mlp is not None and kinds.get("mlp") in ("dense", "moe") and (given := _hook_point(mlp, MLP_IN)) is not None:
        yield Site(layer, "mlp", MLP_IN), Point(given, "given", _as_it_is)
    if mlp is not None and kinds.get("mlp") == "dense":
        point = _hook_point(mlp, DENSE_POST)
        if point is not None and point is not getattr(mlp, "hook_out", None):  # an alias of MoE bridges
            yield Site(layer, "mlp", DENSE_POST), Point(point, "post", _as_it_is)


def _added(block: Any, tensor: str) -> Point | None:
    """Where the tensor is that a sublayer adds to the stream."""
    scale = getattr(block, "residual_contribution_scale", None)
    if scale is not None:  # these blocks' hook points run only under TransformerLens' own hooks
        name = block.scaled_attn_submodule if tensor == ATTN_OUT else block.scaled_mlp_submodule
        module = block._modules.get(name) if name is not None else None
        return None if module is None else Point(module, "out", _scaled(scale))
    point = _hook_point(block, tensor)
    if point is None and tensor == ATTN_OUT:
        mixers = (block._modules.get(name) for name in _OTHER_MIXERS)
        point = next((_hook_point(mixer, "hook_out") for mixer in mixers if mixer is not None), None)
    return None if point is None else Point(point, "out", _as_it_is)


def _head_points(attention: nn.Module) -> dict[str, Point]:
    found = {}
    shown = {tensor: _hook_point(attention, tensor) for tensor in (*_HEADS, PATTERN)}
    for tensor, point in shown.items():
        if point is not None:
            read = _as_it_is if tensor == PATTERN else _converted(point)
            found[tensor] = Point(point, _HEADS.get(tensor, "pattern"), read)
    if _is_a(attention, "MLAAttentionBridge"):
        for tensor in (HEAD_Q, HEAD_K):  # shown after the rotation; elsewhere and here they are those before it
            found.pop(tensor, None)
        # Values are shown with heads before positions, outputs split by the width of a key.
        for tensor, read in ((HEAD_V, _heads_second), (HEAD_Z, _by_value_head(attention))):
            if tensor in found:
                found[tensor] = replace(found[tensor], read=read)
    return found


def _is_a(module: nn.Module, name: str) -> bool:
    return any(c.__name__ == name for c in type(module).__mro__)


def _hook_point(owner: nn.Module, name: str) -> nn.Module | None:
    point = getattr(owner, name, None)
    return point if isinstance(point, nn.Module) and hasattr(point, "hook_conversion") else None


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _scaled(scale: float) -> Callable[[Any], torch.Tensor]:
    def read(output: Any) -> torch.Tensor:
        first: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return first * scale

    return read


def _by_value_head(attention: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    width = int(attention.original_component.v_head_dim)

    def read(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(*tensor.shape[:-1], -1, width)

    return read


def _heads_second(tensor: torch.Tensor) -> torch.Tensor:
    """[row, head, position, d_head] → [row, position, head, d_head]."""
    return tensor.transpose(1, 2)


def _converted(point: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """[row, position, head · d_head] → [row, position, head, d_head], as the bridge shows it to its own hooks."""

    def read(tensor: torch.Tensor) -> torch.Tensor:
        converted: torch.Tensor = tensor if point.hook_conversion is None else point.hook_conversion.convert(tensor)
        return converted

    return read
