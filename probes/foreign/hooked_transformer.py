"""A TransformerLens `HookedTransformer`: an architecture of its own, read through its hook points."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import nn
from torch.utils.hooks import RemovableHandle

from moescope.core.errors import InputError
from moescope.core.sites import (
    ATTN_OUT,
    DENSE_POST,
    EXPERT_INDICES,
    EXPERT_OUT,
    EXPERT_POST,
    EXPERT_WEIGHTS,
    HEAD_K,
    HEAD_Q,
    HEAD_V,
    HEAD_Z,
    MLP_IN,
    MLP_OUT,
    PATTERN,
    RESID_POST,
    RESID_PRE,
    ROUTER_LOGITS,
    Site,
)
from moescope.probes.anatomy import Anatomy, Sublayer
from moescope.probes.foreign.taps import ForeignTaps, Point, Receive
from moescope.probes.live_model import LiveModel

_STREAM = {RESID_PRE: "resid", RESID_POST: "resid", ATTN_OUT: "out", MLP_OUT: "out"}
_HEADS = {HEAD_Q: "q", HEAD_K: "k", HEAD_V: "v", HEAD_Z: "z", PATTERN: "pattern"}
_DECISION, _SLOTS = (EXPERT_INDICES, EXPERT_WEIGHTS), (EXPERT_OUT, EXPERT_POST)


class HookedForward(nn.Module):
    """A HookedTransformer that is called as a model of transformers is.

    Args:
        model: the HookedTransformer, which stays as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Int[torch.Tensor, "row position"],
        attention_mask: Int[torch.Tensor, "row position"] | None = None,
    ) -> Float[torch.Tensor, "row position vocabulary"]:
        """Logits of token ids; positions follow from the mask."""
        logits: torch.Tensor = self.model(input_ids, attention_mask=attention_mask, return_type="logits")
        return logits

    def get_output_embeddings(self) -> nn.Module:
        """The unembedding."""
        unembed: nn.Module = self.model.get_submodule("unembed")
        return unembed


class HookedModel(LiveModel):
    """A HookedTransformer as a live model.

    Args:
        model: the HookedTransformer, on the weights it has: folded and centred where it was loaded so.
        tokenizer: None for its own.
    """

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        name = str(model.cfg.model_name or "HookedTransformer")
        super().__init__(HookedForward(model), model.tokenizer if tokenizer is None else tokenizer, name=name)

    @cached_property
    def anatomy(self) -> Anatomy:
        """What the model is made of, as its configuration and its modules say."""
        return hooked_anatomy(self.module)

    def settings(self) -> dict[str, Any]:
        """What decides the numbers besides weights and text."""
        return super().settings() | {"library": "transformer_lens.HookedTransformer", "attention": "transformer_lens"}


def hooked_anatomy(module: nn.Module) -> Anatomy:
    """The anatomy of a HookedTransformer inside its adapter."""
    model: Any = module.get_submodule("model")
    cfg = model.cfg
    if getattr(cfg, "attention_dir", "causal") != "causal":
        raise InputError(
            f"{cfg.model_name} does not predict the next token",
            expected="a causal language model",
            found="bidirectional attention",
        )
    sublayers: list[Sublayer] = []
    for layer, block in enumerate(model.blocks):
        path = f"model.blocks.{layer}"
        sublayers.append(Sublayer(layer, "attn", "decoder", "attention", f"{path}.attn"))
        if hasattr(block, "mlp"):
            sublayers.append(_mlp(layer, f"{path}.mlp", block.mlp, cfg))
    return Anatomy(
        architecture=type(model).__name__,
        d_model=int(cfg.d_model),
        vocabulary=int(cfg.d_vocab),
        parameters=sum(p.numel() for p in model.parameters()),
        context=int(cfg.n_ctx),
        block_paths=tuple(f"model.blocks.{layer}" for layer in range(cfg.n_layers)),
        sublayers=tuple(sublayers),
    )


def hooked_taps(module: nn.Module, anatomy: Anatomy) -> ForeignTaps:
    """Taps through the hook points of a HookedTransformer: every site it has."""
    points: dict[Site, Point] = {}
    for layer, path in enumerate(anatomy.block_paths):
        block = module.get_submodule(path)
        places = [("", block, _STREAM), ("attn", block._modules.get("attn"), _HEADS)]
        places += [("mlp", block._modules.get("mlp"), {DENSE_POST: "post"})]
        for name, owner, tensors in places:
            for tensor, called in tensors.items():
                point = owner._modules.get(tensor) if owner is not None else None
                if point is not None:
                    points[Site(layer, name, tensor)] = Point(point, called, _as_it_is)
        # The MLP's input has no hook point behind the norm's own weights, but it is what the norm's module gives.
        norm = block._modules.get("ln2")
        if norm is not None and "mlp" in block._modules:
            points[Site(layer, "mlp", MLP_IN)] = Point(norm, "given", _as_it_is)
    routed = [_Routed(s, module.get_submodule(s.path)) for s in anatomy.moe]
    return ForeignTaps(points, routed, whole=True)


class _Routed:
    """The MoE layer of a HookedTransformer: a router, and one module for each expert, called in ascending order.

    Its `hook_expert_weights` sees weights of all experts, from which the layer takes those it uses in a way that depends on
    its class; they are taken here by the same operations, and so come out bit for bit.
    """

    def __init__(self, sublayer: Sublayer, moe: Any) -> None:
        self._moe = moe
        self._weights_by_id = type(moe).__name__ == "GptOssMoE"
        tensors = (ROUTER_LOGITS, *_DECISION, *_SLOTS)
        self.sites = tuple(Site(sublayer.layer, sublayer.block, tensor) for tensor in tensors)

    def hooks(self, sites: Collection[Site], receive: Receive) -> list[RemovableHandle]:
        moe, asked = self._moe, {site.tensor: site for site in sites}
        seen: dict[str, torch.Tensor] = {}
        outs: list[torch.Tensor] = []
        posts: list[torch.Tensor] = []

        def logits(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            receive(asked[ROUTER_LOGITS], {"logits": output})

        def scores(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            seen.clear()
            outs.clear()
            posts.clear()
            seen["scores"] = output

        def decision(_module: nn.Module, _inputs: Any, ids: torch.Tensor) -> None:
            seen["indices"], seen["weights"] = ids, self._weights(seen.pop("scores"), ids)
            for tensor in _DECISION:
                if tensor in asked:
                    receive(asked[tensor], dict(seen))

        def out(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            outs.append(output)

        def post(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
            posts.append(output)

        def slots(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            place, computed = _computed_order(seen["indices"]), torch.cat(outs)
            if EXPERT_POST in asked:
                receive(asked[EXPERT_POST], {"post": torch.cat(posts), "slot": place, "computed": computed, **seen})
            if EXPERT_OUT in asked:
                out_by_slot = computed[place.argsort()].view(*seen["indices"].shape, -1)
                receive(asked[EXPERT_OUT], {"out": out_by_slot, **seen})

        handles = [moe.W_gate.register_forward_hook(logits)] if ROUTER_LOGITS in asked else []
        if not asked.keys() - {ROUTER_LOGITS}:
            return handles
        handles += [moe.hook_expert_weights.register_forward_hook(scores)]
        handles += [moe.hook_expert_indices.register_forward_hook(decision)]
        if asked.keys() & set(_SLOTS):
            handles += [expert.register_forward_hook(out) for expert in moe.experts]
            handles += [moe.register_forward_hook(slots)]
        handles += [e.hook_post.register_forward_hook(post) for e in moe.experts] if EXPERT_POST in asked else []
        return handles

    def _weights(
        self, scores: Float[torch.Tensor, "token n_experts"], ids: Int[torch.Tensor, "token k"]
    ) -> Float[torch.Tensor, "token k"]:
        """The weights that the layer multiplies by, in the type in which it does."""
        dtype = self._moe.W_gate.weight.dtype
        if self._weights_by_id:
            return scores.to(dtype).gather(-1, ids)
        weights = scores.topk(ids.shape[-1], dim=-1).values
        if self._moe.cfg.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(dtype)


def _computed_order(ids: Int[torch.Tensor, "token k"]) -> Int[torch.Tensor, " row"]:
    """Flat places token · k + slot in the order of computation: by expert, then slot, then token."""
    tokens, k = ids.shape
    order = ids.t().reshape(-1).argsort(stable=True)  # places slot · tokens + token
    return order % tokens * k + order.div(tokens, rounding_mode="floor")


def _mlp(layer: int, path: str, mlp: Any, cfg: Any) -> Sublayer:
    if not hasattr(mlp, "experts"):
        return Sublayer(layer, "mlp", "decoder", "dense", path, d_expert=int(cfg.d_mlp))
    return Sublayer(
        layer,
        "mlp",
        "decoder",
        "moe",
        path,
        n_experts=int(cfg.num_experts),
        top_k=int(cfg.experts_per_token),
        n_shared=0,
        n_null=0,
        d_expert=int(cfg.d_mlp),
        router_path=f"{path}.W_gate",
        experts_path=f"{path}.experts",
        logits_path=f"{path}.W_gate",
    )


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
