"""`LiveModel`: a loaded model and its tokenizer, with its anatomy."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moescope.core.errors import InputError
from moescope.core.notebook_html import box, heading
from moescope.core.sites import Site
from moescope.probes.anatomy import Anatomy, find_anatomy, no_live_model
from moescope.probes.custom_layers import custom_layer

if TYPE_CHECKING:
    from moescope.core.intervention import Intervention
    from moescope.core.result import Result
    from moescope.probes.edits.session import Edited
    from moescope.probes.foreign.cache import SiteCache
    from moescope.probes.routing_rule import RoutingRule


class LiveModel:
    """A model ready to be run and looked into; made by `moescope.load`.

    Attributes:
        module: the transformers model, in evaluation mode.
        tokenizer: its tokenizer, None where the model was loaded for token ids only.
        name: what was loaded.
        revision: commit of the weights, or a digest of local files; None where neither is known.

    Raises:
        InputError: the module gives no next-token logits, or is of an architecture that is not understood.

    Example:
        >>> import moescope as ms
        >>> model = ms.load("demo")
        >>> model.anatomy.n_experts, str(model.dtype), model.context
        (16, 'torch.float32', 512)
    """

    def __init__(self, module: nn.Module, tokenizer: Any, *, name: str, revision: str | None = None) -> None:
        self.module = module.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.revision = revision
        _ = self.anatomy  # an unknown architecture is refused now, not in the middle of a run
        output = getattr(module, "get_output_embeddings", None)
        of_ones_own = any(custom_layer(m) for m in module.modules())
        if not of_ones_own and (output is None or output() is None):
            raise InputError(
                f"{type(module).__name__} gives no next-token logits",
                expected="a causal language model with its head",
                fix="load it with AutoModelForCausalLM, or pass its name to load",
            )

    @cached_property
    def anatomy(self) -> Anatomy:
        """What the model is made of, layer by layer."""
        held = weakref.ref(self)  # so that an anatomy that is kept does not keep the model in memory

        def rules() -> dict[tuple[int, str], RoutingRule]:
            if (model := held()) is None:
                raise no_live_model()
            return model._rules()

        return replace(find_anatomy(self.module), rules=rules)

    def _rules(self) -> dict[tuple[int, str], RoutingRule]:
        from moescope.probes.edits.router_rules import rules_of

        return {router: bound.rule for router, bound in rules_of(self).items()}

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the embeddings, whatever devices the other layers are on."""
        getter: Any = getattr(self.module, "get_input_embeddings", None)
        embeddings = getter() if callable(getter) else None
        parameter = next((embeddings if isinstance(embeddings, nn.Module) else self.module).parameters())
        if not parameter.is_meta:
            return parameter.device
        # Weights that accelerate brings in only while a module runs; its hook knows where to.
        hook = getattr(embeddings, "_hf_hook", None)
        return torch.device(getattr(hook, "execution_device", None) or "cpu")

    @property
    def devices(self) -> list[str]:
        """Every device that holds weights, the inputs' first."""
        held = {str(p.device) for p in self.module.parameters() if not p.is_meta}
        return [str(self.device), *sorted(held - {str(self.device)})]

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
            "device": ", ".join(self.devices),
            "threads": torch.get_num_threads(),
            "attention": getattr(config, "_attn_implementation", None),
            "experts": getattr(config, "_experts_implementation", None),
        }

    @property
    def sites(self) -> list[Site]:
        """Every site this model has, layer by layer."""
        from moescope.probes.taps import sites_of

        return sites_of(self.module, self.anatomy)

    def run_with_cache(self, text: Any, names_filter: Any = None) -> tuple[torch.Tensor, SiteCache]:
        """One forward pass and its tensors at every site; see `moescope.probes.foreign.cache.run_with_cache`."""
        from moescope.probes.foreign.cache import run_with_cache

        return run_with_cache(self, text, names_filter)

    def edited(
        self, interventions: Intervention | Sequence[Intervention], *, sources: Mapping[str, Any] | None = None
    ) -> AbstractContextManager[Edited]:
        """A context in which everything the model computes is edited; see `moescope.probes.edits.session.edited`.

        Example:
            >>> import torch, moescope as ms
            >>> from moescope.edits import Ablate, Intervention
            >>> model = ms.load("demo")
            >>> with model.edited(Intervention([Ablate(layer=3, experts=[5, 9], how="route_around")])):
            ...     logits = model.module(input_ids=torch.tensor([[5, 6, 7]])).logits
        """
        from moescope.probes.edits.session import edited

        return edited(self, interventions, sources=sources)

    def logit_attribution(self, text: Any, **options: Any) -> Result:
        """What every expert, head and MLP adds to logits; see `moescope.probes.attribution.logit_attribution`."""
        from moescope.probes.attribution.logit_attribution import logit_attribution

        return logit_attribution(self, text, **options)

    def trace(self, *inputs: Any, **options: Any) -> Any:
        """nnsight's tracing context over this model; modules are named through `self.nnsight`."""
        from moescope.probes.foreign.trace import trace

        return trace(self, *inputs, **options)

    @property
    def nnsight(self) -> Any:
        """nnsight's wrapper around this model: `with m.trace(ids): h = m.nnsight.model.layers[0].output.save()`."""
        from moescope.probes.foreign.trace import wrapped

        return wrapped(self)

    def __repr__(self) -> str:
        a = self.anatomy
        experts = f"{len(a.moe_layers)} MoE layers of {a.n_experts} experts, top-{a.top_k}" if a.moe else "dense"
        return f"LiveModel({self.name!r}: {a.architecture}, {a.n_layers} layers, {experts}, {a.parameters / 1e6:,.1f} M parameters)"

    def _repr_html_(self) -> str:
        settings = self.settings()
        told = [self.revision or "", settings["dtype"], settings["device"]]
        tokenizer = "" if self.tokenizer is not None else "no tokenizer: it takes token ids only"
        return box(heading(self.name, " · ".join(filter(None, told)), tokenizer), self.anatomy._repr_html_())
