"""The way into each expert: the model's own kernel, asked for the output of every (token, slot) pair.

transformers dispatches the experts' computation through a table of implementations. Ours hands the underlying one each
pair as a row of its own with k = 1 and weight 1, which gives the unweighted output of every slot; it then weights and sums
over the slots as the underlying implementation does, so that the block's output stays bit-identical. No expert is run on
a token that did not choose it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import nn

from moescope.core.errors import InputError

IMPLEMENTATION = "moescope_slots"
_TAP = "_moescope_slot_tap"

Receive = Callable[
    [Float[torch.Tensor, "token k d_model"], Int[torch.Tensor, "token k"], Float[torch.Tensor, "token k"]], None
]


@dataclass(frozen=True)
class _SlotTap:
    underlying: str
    forward: Callable[..., torch.Tensor]
    receive: Receive


def reachable(experts: nn.Module) -> bool:
    """Whether transformers dispatches this module's computation, so that its slots can be read."""
    return (
        hasattr(experts, "config")
        and hasattr(experts, "_is_expert_parallel")
        and hasattr(type(experts).forward, "__wrapped__")
    )


@contextmanager
def slots_tapped(taps: Iterable[tuple[nn.Module, Receive]]) -> Iterator[None]:
    """Hand each module's slot outputs to its receiver while the context lasts; everything is restored after it.

    Raises:
        InputError: a module whose computation transformers does not dispatch.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _slots_forward)
    held: list[tuple[Any, str | None]] = []
    modules: list[nn.Module] = []
    try:
        for module, receive in taps:
            if not reachable(module):
                raise InputError(
                    f"the inside of {type(module).__name__} cannot be read",
                    found="a family whose experts transformers does not dispatch",
                    fix="record without the probe `experts`: --probe tokens,routing,residual",
                )
            config: Any = module.config
            if all(config is not c for c, _ in held):
                held.append((config, config._experts_implementation))
            underlying = next(name for c, name in held if c is config) or "eager"
            if underlying == IMPLEMENTATION:
                raise InputError(
                    "this model is already being recorded", fix="let the first recording end before a second begins"
                )
            eager = type(module).forward.__wrapped__  # type: ignore[attr-defined]  # checked by reachable()
            forward = ALL_EXPERTS_FUNCTIONS.get_interface(underlying, eager)
            setattr(module, _TAP, _SlotTap(underlying, forward, receive))
            modules.append(module)
        for config, _ in held:
            config._experts_implementation = IMPLEMENTATION
        yield
    finally:
        for config, name in held:
            config._experts_implementation = name
        for module in modules:
            delattr(module, _TAP)


def _slots_forward(
    self: nn.Module,
    hidden: Float[torch.Tensor, "token d_model"],
    ids: Int[torch.Tensor, "token k"],
    weights: Float[torch.Tensor, "token k"],
) -> Float[torch.Tensor, "token d_model"]:
    tap: _SlotTap = getattr(self, _TAP)
    tokens, k = ids.shape
    if tap.underlying == "eager":
        # The eager loop meets slots in slot-major order, and adds experts by ascending id in the model's own dtype.
        rows, index = hidden.repeat(k, 1), ids.t().reshape(-1, 1)
        out = tap.forward(self, rows, index, torch.ones_like(index, dtype=weights.dtype))
        slots = out.view(k, tokens, -1).transpose(0, 1)
        tap.receive(slots, ids, weights)
        return _sum_by_expert(slots * weights.unsqueeze(-1), ids, hidden.dtype)
    rows, index = hidden.repeat_interleave(k, dim=0), ids.reshape(-1, 1)
    out = tap.forward(self, rows, index, torch.ones_like(index, dtype=weights.dtype))
    slots = out.view(tokens, k, -1)
    tap.receive(slots, ids, weights)
    return (slots * weights.unsqueeze(-1)).sum(dim=1).to(hidden.dtype)


def _sum_by_expert(
    weighted: Float[torch.Tensor, "token k d_model"], ids: Int[torch.Tensor, "token k"], dtype: torch.dtype
) -> Float[torch.Tensor, "token d_model"]:
    order = ids.argsort(dim=1, stable=True)
    total = torch.zeros_like(weighted[:, 0], dtype=dtype)
    for rank in range(ids.shape[1]):
        chosen = order[:, rank, None, None].expand(-1, 1, weighted.shape[-1])
        total = total + weighted.gather(1, chosen).squeeze(1).to(dtype)
    return total
