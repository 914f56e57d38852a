"""Families whose routing is not an experts module called with (hidden states, ids, weights): one entry each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class SpecialRouting:
    """One router of a special family, by attributes of the module that owns it.

    Attributes:
        reader: name of the decision reader.
        router, experts: children that route and compute; "" where there is none.
        logits: child whose output holds the logits, None where none does; and which element of its output they are.
        logits_index: see `logits`.
        top_k: slots a token has.
        block: `mlp`, or `attn` for experts inside attention.
        n_null: pseudo-experts that compute nothing.
        unreachable: why slot outputs cannot be read; None where they can.
        d_expert: neurons of an expert.
        note: what a reader of the records must know.
    """

    reader: str
    top_k: Callable[[Any], int]
    router: str = "router"
    experts: str = "experts"
    logits: str | None = "router"
    logits_index: int = 0
    block: str = "mlp"
    n_null: int = 0
    unreachable: str | None = None
    d_expert: Callable[[Any], int | None] = lambda owner: None
    note: str | None = None


_NLLB_BLIND = "its experts take a 0/1 mask for expert ids, so that only experts 0 and 1 ever run"

SPECIAL: dict[str, tuple[SpecialRouting, ...]] = {
    # Scores multiply the experts' inputs, and every expert runs on every token (on zeros where it was not chosen).
    "Llama4TextMoe": (
        SpecialRouting(
            "dense_scores",
            lambda m: m.top_k,
            logits_index=1,
            unreachable="its weights multiply the experts' inputs, so that there is no output before the weight",
            d_expert=lambda m: m.experts.expert_dim,
            note="the weight multiplies the expert's input, not its output",
        ),
    ),
    # Attention queries and outputs come from experts as well; the gating gives slots sorted by expert.
    "JetMoeMoE": (
        SpecialRouting(
            "sorted_slots",
            lambda m: m.router.top_k,
            experts="",
            logits_index=4,
            unreachable="its two linear maps run on slots sorted by expert, outside any experts module",
            d_expert=lambda m: m.hidden_size,
        ),
    ),
    "JetMoeMoA": (
        SpecialRouting(
            "sorted_slots",
            lambda m: m.router.top_k,
            experts="",
            logits_index=4,
            block="attn",
            unreachable="its experts are the query and output maps of attention",
        ),
    ),
    # Product keys: an expert is one neuron, looked up in two embeddings.
    "DogeCDMoE": (
        SpecialRouting(
            "product_keys",
            lambda m: m.top_k,
            router="router_gate",
            experts="",
            logits=None,
            unreachable="each of its experts is a single neuron looked up by id, not a module",
            d_expert=lambda m: 1,
            note="the ids are those looked up; the weights are computed from the logits, for they pass through no module. "
            "The logits mix tokens, so that a token's routing depends on the whole batch",
        ),
    ),
    # One expert a token; a token over the expert's capacity gets none.
    "SwitchTransformersSparseMLP": (
        SpecialRouting(
            "one_hot",
            lambda m: 1,
            logits_index=2,
            n_null=1,
            unreachable="its experts take a one-hot mask for ids",
            d_expert=lambda m: m.experts["expert_0"].wi.out_features,
            note="the null expert stands for tokens over an expert's capacity, which skip the layer",
        ),
    ),
    # What ran, and what the router had chosen, which is not the same: both are recorded.
    "NllbMoeSparseMLP": (
        SpecialRouting(
            "mask_as_ids",
            lambda m: 2,
            logits=None,
            n_null=1,
            unreachable=_NLLB_BLIND,
            d_expert=lambda m: m.experts["expert_0"].fc1.out_features,
            note=f"what ran: {_NLLB_BLIND}; the router's choice is the second router of this layer",
        ),
        SpecialRouting(
            "shares_of_two",
            lambda m: 2,
            logits_index=2,
            n_null=1,
            unreachable=_NLLB_BLIND,
            note=f"the router's choice, which did not run: {_NLLB_BLIND}. The null expert stands for dropped tokens",
        ),
    ),
    # The router's last class is no expert; it reaches the experts as expert 0 with weight 0.
    "ZayaSparseMoeBlock": (
        SpecialRouting(
            "skipping",
            lambda m: m.gate.top_k,
            router="gate",
            logits="gate",
            n_null=1,
            d_expert=lambda m: m.experts.down_proj.shape[-1],
            note="the null expert is the router's class for no expert",
        ),
    ),
}

# Routers whose output is probabilities under the name of logits: the child whose output are the logits.
LOGITS_CHILD = {"Gemma4TextRouter": "proj", "DiffusionGemmaTextRouter": "proj"}


def special_routings(module: nn.Module) -> tuple[SpecialRouting, ...]:
    """The routers of a module of a special family; none for any other."""
    return SPECIAL.get(type(module).__name__, ())
