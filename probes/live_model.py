"""`LiveModel`: a loaded model and its tokenizer, with its anatomy."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import nn

from moescope.core.errors import InputError
from moescope.core.text import escaped
from moescope.probes.anatomy import Anatomy, find_anatomy


class LiveModel:
    """A model ready to be run and looked into; made by `moescope.load`.

    Attributes:
        module: the transformers model, in evaluation mode.
        tokenizer: its tokenizer, None where the model was loaded for token ids only.
        name: what was loaded.
        revision: commit of the weights, or a digest of local files; None where neither is known.
    """

    def __init__(self, module: nn.Module, tokenizer: Any, *, name: str, revision: str | None = None) -> None:
        self.module = module.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.revision = revision
        output = getattr(module, "get_output_embeddings", None)
        if output is None or output() is None:
            raise InputError(
                f"{type(module).__name__} gives no next-token logits",
                expected="a causal language model with its head",
                fix="load it with AutoModelForCausalLM, or pass its name to load",
            )
        _ = self.anatomy  # an unknown architecture is refused now, not in the middle of a run

    @cached_property
    def anatomy(self) -> Anatomy:
        """What the model is made of, layer by layer."""
        return find_anatomy(self.module)

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the embeddings."""
        parameter = next(self.module.parameters())
        return parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.module.parameters()).dtype

    @property
    def pad_id(self) -> int:
        """An id to fill masked positions with."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return int(pad) if pad is not None and pad < self.anatomy.vocabulary else 0

    @property
    def context(self) -> int | None:
        """Longest sequence the model takes; None where it does not say."""
        return self.anatomy.context

    def settings(self) -> dict[str, Any]:
        """What decides the numbers besides weights and text: dtype, device, kernels."""
        config = getattr(self.module, "config", None)
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "attention": getattr(config, "_attn_implementation", None),
            "experts": getattr(config, "_experts_implementation", None),
        }

    def __repr__(self) -> str:
        a = self.anatomy
        experts = f"{len(a.moe_layers)} MoE layers of {a.n_experts} experts, top-{a.top_k}" if a.moe else "dense"
        return f"LiveModel({self.name!r}: {a.architecture}, {a.n_layers} layers, {experts}, {a.parameters / 1e6:,.1f} M parameters)"

    def _repr_html_(self) -> str:
        return f"<b>{escaped(self.name)}</b>{self.anatomy._repr_html_()}"
