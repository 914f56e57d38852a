"""The way into each expert: what the model's own kernel computes for every (token, slot) pair. No other pair is ever run.

`forward` is overridden on the module's instance while the context lasts, and looks at each call at how the module computes
just then (transformers changes the implementation between prefill and decode):

* grouped_mm, batched_mm: the kernel runs as it is, on what it was given. The point where it would norm an expert's output
  hands that output over, so that the block's output is the model's own.
* the eager loop: it runs as it is, on what it was given, and what it multiplies by a token's weight is noted.
* anything else: run as it is, and a second time with each pair as a row of its own.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import nn

from moescope.core.errors import InputError
from moescope.probes.expert_access import (
    Way,
    argument_names,
    gate_place,
    is_dispatched,
    neurons_reachable,
    reachable,
    ways_of,
    why_unreachable,
)
from moescope.probes.loop_watch import Activated, LoopNotes, WatchedWeights

__all__ = ["SlotTap", "neurons_reachable", "reachable", "slots_tapped", "why_unreachable"]

Tensors = dict[str, torch.Tensor]
_MARK = "_moescope_slots"
_NARROW = (torch.bfloat16, torch.float16)
_entering = threading.Lock()


@dataclass(frozen=True)
class SlotTap:
    """What to read inside one experts module.

    Attributes:
        experts: the module.
        receive: called at each forward pass, before the module gives its output, with
            `indices`, `weights` [token, k], as given to the module;
            `out` [token, k, d_model], every slot's output before its weight;
            with `neurons`, `post` [slot, d_expert], the input of the down projection, in the order in which the kernel
            computes, and `slot` [slot], which place of token · k each row of it is. (Null experts and other ranks' experts
            have no neurons, and then fewer rows than token · k. Implementations that are closed give neither.)
            Where the kernel computes in an order of its own, `computed` [token · k, d_model] is `out` in that order, and
            `slot` is its order too.
        neurons: whether to read neurons.
        out: whether `out` is needed. Without it a kernel's outputs come as `computed` and `slot` only, which saves
            bringing them into token order.
    """

    experts: nn.Module
    receive: Callable[[Tensors], None]
    neurons: bool = False
    out: bool = True


@contextmanager
def slots_tapped(taps: Iterable[SlotTap]) -> Iterator[None]:
    """Hand each module's slots to its receiver while the context lasts; every module is then as it was found.

    Passes of the thread that entered are read; another may use the model meanwhile, and is not.

    Raises:
        InputError: a module whose slots cannot be read, or one that is being read already, by this thread or another.
    """
    with ExitStack() as stack:
        for tap in taps:
            reason = why_unreachable(tap.experts)
            if reason is None and tap.neurons and not neurons_reachable(tap.experts):
                reason = "where its neurons pass is not known"
            if reason is not None:
                raise InputError(
                    f"the inside of {type(tap.experts).__name__} cannot be read",
                    found=reason,
                    fix="record without the probe `experts`: --probe tokens,routing,residual",
                )
            with _entering:
                if _MARK in vars(tap.experts):
                    raise InputError(
                        "this model is already being recorded", fix="let the first recording end before a second begins"
                    )
                _override(stack, tap.experts, _MARK, True)
            _Slots(tap).enter(stack)
        yield


def _override(stack: ExitStack, module: nn.Module, name: str, value: object) -> None:
    """Set an attribute of this instance alone; what stood there, or nothing, stands there again at the end."""
    held = vars(module)  # past nn.Module's own bookkeeping: a registered submodule stays where it is registered

    def put_back(found: bool = name in held, before: object = held.get(name)) -> None:
        if found:
            held[name] = before
        else:
            held.pop(name, None)

    stack.callback(put_back)
    held[name] = value


class _Slots:
    """One module while it is tapped."""

    def __init__(self, tap: SlotTap) -> None:
        self.tap, self.thread = tap, threading.get_ident()
        self.module: Any = tap.experts
        self.plain: Callable[..., torch.Tensor] = tap.experts.forward
        self.names = argument_names(tap.experts)[:3]
        self.ways = ways_of(tap.experts)
        self.dispatched = is_dispatched(tap.experts)
        self.norm = getattr(tap.experts, "post_expert_norm", None)
        self.has_norm = bool(getattr(tap.experts, "has_post_expert_norm", False))
        self.way: Way | None = None  # how the call now running computes; None outside a call
        self.decision: tuple[torch.Tensor, torch.Tensor] | None = None  # ids and weights of the kernel now running
        self.neurons: list[torch.Tensor] = []
        self.notes = LoopNotes()

    def enter(self, stack: ExitStack) -> None:
        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            return self._forward(*args, **kwargs)

        _override(stack, self.module, "forward", functools.update_wrapper(forward, self.plain))  # its signature as well
        if "grouped_mm" in self.ways or "batched_mm" in self.ways:
            _override(stack, self.module, "has_post_expert_norm", self.has_norm)
            _override(stack, self.module, "post_expert_norm", self._on_output)
        if not self.tap.neurons:
            return
        place, name, needs_up = gate_place(self.module)
        act: Any = getattr(place, name)
        self.act: Callable[..., torch.Tensor] = act
        _override(stack, place, name, self._on_gate if needs_up else self._on_neurons)
        if needs_up and self.dispatched:
            self.gate: Callable[..., torch.Tensor] = self.module._apply_gate
            _override(stack, self.module, "_apply_gate", self._on_kernel_gate)

    def _forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self._mine():
            return self.plain(*args, **kwargs)
        given = dict(zip(self.names, args, strict=False)) | kwargs
        hidden, ids, weights = (given[name] for name in self.names)
        name = self.module.config._experts_implementation if self.dispatched else None
        self.way = self.ways.get(name, "opaque")
        kernel = self.way in ("grouped_mm", "batched_mm")
        if "has_post_expert_norm" in vars(self.module):
            self.module.has_post_expert_norm = kernel or self.has_norm
        try:
            if kernel:
                return self._through_kernel(args, kwargs, ids, weights)
            if self.way == "loop":
                return self._through_loop(args, kwargs, hidden, ids, weights)
            return self._beside(self.plain(*args, **kwargs), hidden, ids, weights)
        finally:
            self.way = None

    def _through_kernel(self, args: Any, kwargs: Any, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self.decision = ids, weights
        try:
            return self.plain(*args, **kwargs)
        finally:
            self.decision = None
            self.neurons.clear()

    def _on_output(self, out: torch.Tensor) -> torch.Tensor:
        """Hand over what a kernel computed at once: the kernel lets go of it soon, and it is still in the cache."""
        if self.has_norm and self.norm is not None:
            out = self.norm(out)
        if self.decision is None or not self._mine():
            return out
        ids, weights = (given.to(out.device) for given in self.decision)
        # A compiler keeps what it adds up in float32. Asked for it in a narrower type it would round it, for the model as well.
        seen = out.float() if torch.compiler.is_compiling() and out.dtype in _NARROW else out
        slot = number = torch.arange(ids.numel(), device=out.device)
        ordered = seen
        if self.way == "grouped_mm":
            slot = torch.sort(ids.reshape(-1)).indices  # as the kernel sorts
            if self.tap.out:
                ordered = seen.index_select(0, torch.empty_like(slot).scatter_(0, slot, number))
        more = {"computed": seen, "slot": slot}
        if self.tap.out:
            more["out"] = ordered.reshape(*ids.shape, out.shape[-1])
        if self.tap.neurons:
            more["post"] = self.neurons[0]
        self._hand_over(ids, weights, **more)
        return out

    def _through_loop(
        self, args: Any, kwargs: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        k, self.notes = ids.shape[1], LoopNotes()
        watched = WatchedWeights.around(weights, self.notes)
        named = {name: watched if given is weights else given for name, given in kwargs.items()}
        result = self.plain(*(watched if given is weights else given for given in args), **named)
        notes, self.notes = self.notes, LoopNotes()
        if not notes.outs:
            return self._beside(result, hidden, ids, weights)
        more = {"out": notes.out(len(ids), k)}
        if notes.posts:
            more |= {"post": torch.cat(notes.posts), "slot": notes.place(k, len(notes.posts))}
        self._hand_over(ids, weights, **more)
        return result

    def _beside(
        self, result: torch.Tensor, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The module's own result, and its slots from a second run."""
        with torch.no_grad():
            self._hand_over(ids, weights, out=self._rows_alone(hidden, ids, weights))
        return result

    def _rows_alone(
        self, hidden: torch.Tensor, ids: Int[torch.Tensor, "token k"], weights: Float[torch.Tensor, "token k"]
    ) -> Float[torch.Tensor, "token k d_model"]:
        """Every slot's output, from one call with k = 1 and weight 1. Rows are slot-major, as the loop meets slots."""
        tokens, k = ids.shape
        rows = hidden.reshape(-1, hidden.shape[-1]).repeat(k, 1)
        index = ids.t().reshape(-1, 1)
        out = self.plain(rows, index, torch.ones_like(index, dtype=weights.dtype, device=weights.device))
        return out.reshape(k, tokens, out.shape[-1]).transpose(0, 1)

    def _hand_over(self, ids: torch.Tensor, weights: torch.Tensor, **more: torch.Tensor) -> None:
        self.tap.receive({"indices": ids, "weights": weights, **more})

    def _on_neurons(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        post = self.act(*args, **kwargs)
        if self._mine():
            (self.notes.posts if self.way == "loop" else self.neurons).append(post)
        return post

    def _on_kernel_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        post = self.gate(gate_up)
        if self._mine():
            self.neurons.append(post)
        return post

    def _on_gate(self, gate: torch.Tensor) -> Any:
        activated = self.act(gate)
        return Activated(activated, self.notes) if self.way == "loop" and self._mine() else activated

    def _mine(self) -> bool:
        """Whether the thread that put the tap on is running; the model is anybody's to use meanwhile, and only that one's read."""
        return torch.compiler.is_compiling() or threading.get_ident() == self.thread
