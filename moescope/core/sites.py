"""Names of places in the forward pass, spelled as TransformerLens spells them.

A site is `blocks.{layer}.{rest}`; `rest` names the sublayer and the tensor. A second sublayer of a kind in one layer
is `mlp.1` or `attn.1`, and that part of the name is what the store calls `block`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from moescope.core.errors import InputError

_SITE = re.compile(r"blocks\.(?P<layer>\d+)\.(?P<rest>[\w.]+)")
_BLOCK = re.compile(r"(?P<block>(?:mlp|attn)(?:\.\d+)?)\.(?P<tensor>.+)")

RESID_PRE = "hook_resid_pre"
RESID_POST = "hook_resid_post"
ATTN_OUT = "hook_attn_out"
MLP_OUT = "hook_mlp_out"
MLP_IN = "hook_in"
ROUTER_LOGITS = "hook_router_logits"
EXPERT_INDICES = "hook_expert_indices"
EXPERT_WEIGHTS = "hook_expert_weights"
EXPERT_OUT = "experts.hook_out"
EXPERT_POST = "experts.hook_post"
SHARED_OUT = "shared_expert.hook_out"
DENSE_POST = "hook_post"
PATTERN = "hook_pattern"
HEAD_Z, HEAD_Q, HEAD_K, HEAD_V = "hook_z", "hook_q", "hook_k", "hook_v"


@dataclass(frozen=True, order=True)
class Site:
    """One place in the forward pass.

    Attributes:
        layer: 0-based index of the block.
        block: the sublayer (`mlp`, `attn`, `mlp.1`, …), or "" for the residual stream.
        tensor: which tensor there, for instance `hook_router_logits` or `experts.hook_out`.

    Example:
        >>> str(Site(3, "mlp", "hook_router_logits"))
        'blocks.3.mlp.hook_router_logits'
        >>> Site.parse("blocks.0.hook_resid_post")
        Site(layer=0, block='', tensor='hook_resid_post')
    """

    layer: int
    block: str
    tensor: str

    def __str__(self) -> str:
        middle = f"{self.block}." if self.block else ""
        return f"blocks.{self.layer}.{middle}{self.tensor}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read a site's name; raises `InputError` where it is none."""
        match = _SITE.fullmatch(text)
        if match is None:
            raise InputError(
                f"{text!r} is not a site",
                expected="blocks.{layer}.{tensor}, for instance blocks.3.mlp.hook_router_logits",
            )
        inner = _BLOCK.fullmatch(match["rest"])
        block, tensor = (inner["block"], inner["tensor"]) if inner else ("", match["rest"])
        return cls(int(match["layer"]), block, tensor)
