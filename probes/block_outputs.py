"""What the sublayers of a block add to the residual stream, and where that can be read.

As in TransformerLens 3.9, `hook_attn_out` and `hook_mlp_out` are what is added to the stream: after a norm that follows
the sublayer (`ln1_post` there), and after a factor that the family puts on it. The norm is found while the model runs: it
is the child of the block that is handed the sublayer's output. Factors that a block multiplies in its own forward pass
through no module; they are listed here.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import nn

from moescope.core.sites import ATTN_OUT, MLP_OUT, Site
from moescope.probes.anatomy import Anatomy, Sublayer
from moescope.probes.projections import down_projection, output_projection, widths

Stream = Float[torch.Tensor, "row position d_model"]

SHARED_NAME = re.compile(r"shared_experts?|shared_mlp|shared_transition")
_CHANGES_IN_PLACE = re.compile(r"[-+*/]=(?!=)|\.\w*[a-z]_\(")

# Part of a class's name, of a block or of something in it → why the block has no stream of one vector a token.
_NO_STREAM = {
    "HyperConnection": "its blocks hand on several residual streams, mixed by hyper-connections",
    "TextGatedResidual": "its blocks hand on several residual streams, mixed by hyper-connections",
    "AltUp": "its blocks hand on several residual streams, of which alternating ones are updated",
    "BlockAttentionResidual": "its blocks attend to earlier blocks' outputs instead of adding to one stream",
    "XLNetLayer": "its stream lies as [position, row, d_model]",
    "ReformerLayer": "its blocks hand on two streams (a reversible network)",
    "ProphetNetDecoderLayer": "its blocks hand on a main and several predicting streams as one",
}
# Modules that add the stream themselves, or hand it on with their output: the child whose output is what they add.
_INNER = {"SwitchTransformersLayerFF": "mlp", "T5LayerFF": "DenseReluDense"}


@dataclass(frozen=True)
class Contribution:
    """What one sublayer adds to the stream.

    Attributes:
        modules: modules whose outputs are summed; usually one.
        factor: what the block itself does with that sum before it adds it; None for nothing.
    """

    modules: tuple[nn.Module, ...]
    factor: Callable[[Stream], Stream] | None = None


def why_no_stream(block: nn.Module) -> str | None:
    """Why a block has no residual stream of shape [row, position, d_model]; None where it has one."""
    if runs_again(block):
        return "its blocks run several times in one pass"
    names = {type(m).__name__ for m in block.modules()}
    return next((reason for part, reason in _NO_STREAM.items() if any(part in name for name in names)), None)


def runs_again(block: nn.Module) -> bool:
    """Whether a model runs a block several times in one pass, so that a site there is no one tensor."""
    return type(block).__name__.startswith("HrmText")


def contributions(model: nn.Module, anatomy: Anatomy, layer: int) -> dict[Site, Contribution]:
    """What the sublayers of a block add to the stream, by site; nothing for a block without a stream.

    `hook_attn_out` is the token mixer's, whatever its kind: attention, linear attention or state space. A second sublayer
    of a kind has its number in its site (`blocks.0.attn.1.hook_attn_out`).
    """
    block = model.get_submodule(anatomy.block_paths[layer])
    if why_no_stream(block) is not None:
        return {}
    found: dict[Site, Contribution] = {}
    taken: set[str] = set()
    for s in (s for s in anatomy.sublayers if s.layer == layer):
        mixer = s.block.startswith("attn")
        if s.path in taken or (mixer and s.kind not in ("attention", "ssm")):
            continue  # a second router of one module; a router inside attention
        if next(model.get_submodule(s.path).parameters(), None) is None:
            continue  # a dropout, an identity
        taken.add(s.path)
        site = Site(layer, "" if s.block in ("attn", "mlp") else s.block, ATTN_OUT if mixer else MLP_OUT)
        modules = (_mixer(model, s, anatomy),) if mixer else _mlp(model, s, anatomy, block)
        if None not in modules:
            kind = "mlp" if not mixer else "attn" if s.kind == "attention" else "ssm"
            found[site] = Contribution(modules, _factor(block, kind))  # type: ignore[arg-type]  # None was ruled out
    joined = _joined_feed_forward(block)
    if joined is not None:
        found = {site: c for site, c in found.items() if site.tensor != MLP_OUT}
        found[Site(layer, "", MLP_OUT)] = Contribution((joined,))
    return found


def changes_in_place(module: nn.Module) -> bool:
    """Whether a module's forward pass changes tensors in place, so that what a hook was given may not last."""
    try:
        source = inspect.getsource(inspect.unwrap(type(module).forward))
    except (OSError, TypeError):  # a class made at run time: no source to look at
        return True
    return _CHANGES_IN_PLACE.search(source) is not None


def _mixer(model: nn.Module, s: Sublayer, anatomy: Anatomy) -> nn.Module | None:
    module = model.get_submodule(s.path)
    return output_projection(module, anatomy.d_model) if _takes_residual(module) else module


def _mlp(model: nn.Module, s: Sublayer, anatomy: Anatomy, block: nn.Module) -> tuple[nn.Module | None, ...]:
    module = model.get_submodule(s.path)
    if s.kind == "dense" and (_takes_residual(module) or widths(module) is not None):
        return (down_projection(model, s.path, anatomy.d_model),)
    if inner := _INNER.get(type(module).__name__):
        return (model.get_submodule(f"{s.path}.{inner}"),)
    beside = [c for name, c in block.named_children() if s.kind == "moe" and SHARED_NAME.fullmatch(name)]
    return (module, *beside)


def _takes_residual(module: nn.Module) -> bool:
    """Whether a module is handed the stream and adds it to its output by itself, as Bloom's and MPT's do."""
    return "residual" in inspect.signature(module.forward).parameters


def _joined_feed_forward(block: nn.Module) -> nn.Module | None:
    """The norm of the sum of a dense MLP and experts that run side by side (Gemma 4): only that norm's output is added."""
    both = hasattr(block, "post_feedforward_layernorm_1") and hasattr(block, "post_feedforward_layernorm_2")
    return getattr(block, "post_feedforward_layernorm", None) if both else None


def _factor(block: Any, kind: str) -> Callable[[Stream], Stream] | None:
    """What a block does with a sublayer's output before it adds it, by the attributes that hold the factor."""
    # Granite and HyperCLOVA X; MiniCPM 3; MiniMax, whose linear attention has the name of attention too; Falcon H1
    factors = "residual_multiplier", "residual_scale", f"{kind}_beta_factor", f"{kind}_out_multiplier"
    for name in factors:
        if isinstance(getattr(block, name, None), (int, float)):
            return lambda out: out * getattr(block, name)
    bias = getattr(getattr(block, "attention", None), "dense_bias", None)
    if kind != "mlp" and isinstance(bias, nn.Parameter):  # GPT-NeoX Japanese hands it on beside its output
        return lambda out: out + bias
    if isinstance(getattr(block, f"{kind}_residual_add_idx", None), int):  # Beam
        return lambda out: out * (1.0 / float(getattr(block, f"{kind}_residual_add_idx")) ** 0.5)
    scaling: Any = getattr(block, f"post_{'mlp' if kind == 'mlp' else 'attention'}_residual_scale", None)
    if hasattr(scaling, "hidden_states_scale"):  # Zaya
        return lambda out: (out + scaling.hidden_states_bias) * scaling.hidden_states_scale
    return None
