"""Per-head queries, keys, values and outputs of an attention module, read at its projections.

As in TransformerLens 3.9, `hook_q`, `hook_k`, `hook_v` are the outputs of the projections, before any norm of queries and
keys, clipping or rotation; keys and values have their own, smaller number of heads. `hook_z` is what the output projection
is given: heads summed over keys, after the gate where a family gates attention.

What has no such vectors is left out: keys of multi-head latent attention (a part of each is shared by all heads) and,
with them, its queries; keys and values that a convolution mixes across tokens; queries made by experts (JetMoe).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import nn

from moescope.core.sites import HEAD_K, HEAD_Q, HEAD_V, HEAD_Z
from moescope.probes.projections import output_projection, widths

Heads = Float[torch.Tensor, "row position head d_head"]
Split = Callable[[torch.Tensor], Heads]

_SEPARATE = (("q_proj", "k_proj", "v_proj"), ("q", "k", "v"), ("query", "key", "value"), ("wq", "wk", "wv"))
# Classes whose query projection gives each head its query and, after it, its gate.
_GATED = re.compile(r"Qwen(3Next|3_5|3_5Moe|4ExpText)Attention")
# Class → name of the projection of queries, keys and values together, and how they lie in its output:
# blocks: all queries, all keys, all values; heads: [head, (query, key, value), d_head];
# groups: [key head, (its queries, key, value), d_head]; partitions: four of (queries, values, keys).
_FUSED = {
    "GPT2Attention": ("c_attn", "blocks"),
    "Attention": ("c_attn", "blocks"),  # the first GPT
    "Phi3Attention": ("qkv_proj", "blocks"),
    "Phi4MultimodalAttention": ("qkv_proj", "blocks"),
    "DbrxAttention": ("Wqkv", "blocks"),
    "MptAttention": ("Wqkv", "blocks"),
    "GPTNeoXAttention": ("query_key_value", "heads"),
    "GPTNeoXJapaneseAttention": ("query_key_value", "heads"),
    "BloomAttention": ("query_key_value", "heads"),
    "PersimmonAttention": ("query_key_value", "heads"),
    "FalconAttention": ("query_key_value", "falcon"),
    "GPTBigCodeAttention": ("c_attn", "bigcode"),
    "CodeGenAttention": ("qkv_proj", "partitions"),
    "JetMoeAttention": ("kv_proj", "keys and values"),
}
# Two halves of the heads are subtracted from each other, and put out as half as many heads of twice the width.
_UNLIKE = ("DiffLlamaAttention",)
KNOWN_CLASSES = frozenset(_FUSED)


@dataclass(frozen=True)
class HeadReading:
    """Where a per-head vector passes, and how it lies there.

    Attributes:
        module: a projection.
        side: whether it is what the projection is given, or what it gives.
        split: from that, [row, position, width], to [row, position, head, d_head].
        cached: whether the projection works on the whole KV cache, of which the newest positions are wanted.
    """

    module: nn.Module
    side: Literal["in", "out"]
    split: Split
    cached: bool = False


def head_vectors(attention: nn.Module, d_model: int) -> dict[str, HeadReading]:
    """Site tensor (`hook_q`, …) → how to read it, for those that an attention module has."""
    if type(attention).__name__ in _UNLIKE:
        return {}
    if type(attention).__name__ in _FUSED:
        found = _fused(attention)
    elif isinstance(getattr(attention, "kv_b_proj", None), nn.Module):
        found = _latent(attention)
    else:
        found = _separate(attention, d_model)
    n_heads = _n_heads(attention, found.pop("n_heads", None))
    readings: dict[str, HeadReading] = {name: r for name, r in found.items() if isinstance(r, HeadReading)}
    end = output_projection(attention, d_model)
    size = widths(end) if end is not None else None
    if end is not None and size is not None and n_heads and size[0] % n_heads == 0:
        readings[HEAD_Z] = HeadReading(end, "in", _by_width(size[0] // n_heads))
    return readings


def _separate(attention: nn.Module, d_model: int) -> dict[str, Any]:
    attention = getattr(attention, "attention", attention)  # GPT-Neo's, which wraps one of two kinds
    children: dict[str, nn.Module] = dict(attention.named_children())
    names = next((names for names in _SEPARATE if names[0] in children and names[1] in children), None)
    width = _d_head(attention)
    if names is None or width is None:
        return {}
    query, key, value = (children.get(name) for name in names)
    outs = [size[1] if m is not None and (size := widths(m)) is not None else 0 for m in (query, key, value)]
    value_width = getattr(attention, "v_head_dim", None) or width
    end = output_projection(attention, d_model)
    heads_in = size[0] // value_width if end is not None and (size := widths(end)) is not None else None
    found: dict[str, Any] = {"n_heads": heads_in}
    if query is not None and outs[0] == (heads_in or 0) * width:
        found[HEAD_Q] = HeadReading(query, "out", _by_width(width))
    elif query is not None and _GATED.fullmatch(type(attention).__name__) and outs[0] == (heads_in or 0) * 2 * width:
        found[HEAD_Q] = HeadReading(query, "out", lambda x: _by_width(2 * width)(x)[..., :width])
    mixed = any("conv" in name for name in children)
    if key is not None and not mixed and outs[1] and outs[1] % width == 0:
        found[HEAD_K] = HeadReading(key, "out", _by_width(width))
        if value is not None and outs[2] == outs[1] // width * value_width:
            found[HEAD_V] = HeadReading(value, "out", _by_width(value_width))
    return found


def _latent(attention: Any) -> dict[str, Any]:
    """Multi-head latent attention: values come out of one projection with the unrotated part of the keys.

    What is cached is what that projection is given, as a single head: [row, 1, key, width].
    """
    heads, width = attention.num_heads, attention.v_head_dim
    size = widths(attention.kv_b_proj)
    found: dict[str, Any] = {"n_heads": heads}
    if size is not None and size[1] == heads * (attention.qk_nope_head_dim + width):
        each = _by_width(size[1] // heads)
        found[HEAD_V] = HeadReading(
            attention.kv_b_proj, "out", lambda x: each(x.flatten(1, -2))[..., -width:], cached=True
        )
    return found


def _fused(attention: nn.Module) -> dict[str, Any]:
    child, layout = _FUSED[type(attention).__name__]
    module: Any = getattr(attention, child, None)
    size = widths(module) if isinstance(module, nn.Module) else None
    heads, width = _n_heads(attention, None), _d_head(attention)
    if size is None or not heads or not width:
        return {}
    if layout == "keys and values":  # queries and outputs come from experts: no projection shows them
        split = _blocks(0, size[1] // width // 2, width)
        return {name: HeadReading(module, "out", split(n)) for n, name in ((1, HEAD_K), (2, HEAD_V))}
    if layout == "falcon":
        layout = _falcon_layout(attention)
    elif layout == "bigcode":
        layout = "blocks" if getattr(attention, "multi_query", False) else "heads"
    splits: dict[str, Callable[[int], Split]] = {
        "blocks": _blocks(heads, (size[1] // width - heads) // 2, width),
        "heads": lambda n: lambda x: _laid_out(x, heads, 3, width)[..., n, :],
        "groups": lambda n: _grouped(n, getattr(attention, "num_kv_heads", 1), width),
        "partitions": lambda n: _partitioned(n, heads, width),
    }
    return {
        "n_heads": heads,
        **{name: HeadReading(module, "out", splits[layout](n)) for n, name in enumerate((HEAD_Q, HEAD_K, HEAD_V))},
    }


def _falcon_layout(attention: Any) -> str:
    """Falcon's: groups in its new architecture; with one key head, all queries, the key, the value; else by head."""
    if attention.new_decoder_architecture:
        return "groups"
    return "blocks" if attention.multi_query else "heads"


def _blocks(heads: int, key_heads: int, width: int) -> Callable[[int], Split]:
    starts = (0, heads, heads + key_heads, heads + 2 * key_heads)
    return lambda n: lambda x: _laid_out(x[..., starts[n] * width : starts[n + 1] * width], -1, width)


def _grouped(n: int, key_heads: int, width: int) -> Split:
    def split(x: torch.Tensor) -> Heads:
        groups = _laid_out(x, key_heads, -1, width)
        return groups[..., :-2, :].flatten(-3, -2) if n == 0 else groups[..., n - 3, :]

    return split


def _partitioned(n: int, heads: int, width: int) -> Split:
    place = (0, 2, 1)[n]  # CodeGen: each of four parts of the projection gives queries, values, keys
    return lambda x: _laid_out(x, 4, 3, heads // 4, width)[..., place, :, :].flatten(-3, -2)


def _by_width(width: int) -> Split:
    return lambda x: _laid_out(x, -1, width)


def _laid_out(x: torch.Tensor, *sizes: int) -> torch.Tensor:
    """`x` with its last dimension as several."""
    return x.reshape(*x.shape[:-1], *sizes)


def _d_head(attention: Any) -> int | None:
    names = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
    width = next((v for name in names if isinstance(v := getattr(attention, name, None), int)), None)
    if width is not None:
        return width
    end = next((size for m in attention.children() if (size := widths(m)) is not None), None)
    heads = _n_heads(attention, None)
    return end[0] // heads if end is not None and heads and end[0] % heads == 0 else None


def _n_heads(attention: Any, known: Any) -> int | None:
    if isinstance(known, int):
        return known
    names = ("num_heads", "num_attention_heads", "n_heads", "n_head")
    holders = (attention, getattr(attention, "config", None))
    return next((v for holder in holders for n in names if isinstance(v := getattr(holder, n, None), int)), None)
