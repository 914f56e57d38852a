"""Hooks at a router and its experts: the decision is taken on its way to the experts, edited, and handed on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moescope.core.errors import RunError
from moescope.probes.anatomy import Sublayer
from moescope.probes.edits.decision_steps import RouterStep
from moescope.probes.edits.now import Now
from moescope.probes.edits.router_view import settle, view_of
from moescope.probes.edits.step import Decision, DecisionStep

if TYPE_CHECKING:
    from moescope.probes.edits.session import Edited

# Readers of decisions that can be handed on changed.
EDITABLE = ("experts", "skipping", "dense_scores")

WHY_NOT_EDITABLE = {
    "one_hot": "its experts take one-hot masks, from a router that drops tokens over an expert's capacity",
    "mask_as_ids": "its experts take a 0/1 mask for expert ids: what it decides is not what runs",
    "shares_of_two": "what this router decides does not run",
    "sorted_slots": "its linear maps run on slots sorted by expert; no experts module is given the decision",
    "product_keys": "its experts are looked up in two embeddings, and the weights pass through no module",
    "registered": "a layer announced with register_moe says how its decision is read, and not how it is changed",
}


def attach_decisions(stack: ExitStack, session: Edited, s: Sublayer, program: Sequence[DecisionStep[Any]]) -> None:
    """Hook one router for as long as `stack` lasts; hooks of ours run before any that taps put on."""
    for handle in _Router(session, s, program).hooks():
        stack.callback(handle.remove)


class _Router:
    """One router while it is edited."""

    def __init__(self, session: Edited, s: Sublayer, program: Sequence[DecisionStep[Any]]) -> None:
        self.session, self.s, self.program = session, s, program
        self.logits: torch.Tensor | None = None
        self.added: torch.Tensor | None = None
        self.taken: Decision | None = None  # what the experts were given, where a step changes what they put out

    def hooks(self) -> list[Any]:
        """Put them on."""
        module = self.session.module
        needs_logits = any(step.reads_logits for step in self.program)
        found = []
        if needs_logits:
            at = module.get_submodule(self.s.logits_path or "")
            found.append(at.register_forward_hook(self._keep_logits, prepend=True))
        if self.s.reader == "dense_scores":
            router = module.get_submodule(self.s.router_path or "")
            return [*found, router.register_forward_hook(self._dense_scores)]
        experts = module.get_submodule(self.s.experts_path or "")
        found.append(experts.register_forward_pre_hook(self._given, with_kwargs=True, prepend=True))
        found.append(experts.register_forward_hook(self._output, prepend=True))
        return found

    def _keep_logits(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if self.session.now is None:
            return
        found = output[self.s.router_logits_index] if isinstance(output, (tuple, list)) else output
        self.logits = found.reshape(-1, found.shape[-1])

    def _given(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        now = self.session.now
        if now is None:
            return None
        names = list(inspect.signature(module.forward).parameters)[:3]
        given = dict(zip(names, inputs, strict=False)) | {name: named[name] for name in names if name in named}
        hidden, second, third = (given[name] for name in names)
        ids, weights = _READ[self.s.reader](second, third, self.s)
        decision = self._decided(Decision(hidden.reshape(-1, hidden.shape[-1]), ids, weights, self.logits), now)
        changed = dict(zip(names[1:], _WRITE[self.s.reader](decision, second, third, self.s), strict=True))
        args = tuple(changed.get(name, value) for name, value in zip(names, inputs, strict=False))
        return (*args, *inputs[len(args) :]), {name: changed.get(name, value) for name, value in named.items()}

    def _output(self, module: nn.Module, _inputs: Any, output: Any) -> Any:
        added, self.added = self.added, None
        taken, self.taken = self.taken, None
        now = self.session.now
        if now is None:
            return None
        for changing in self.program:
            if taken is not None and changing.live and (more := changing.outputs(module, taken, now)) is not None:
                added = more if added is None else added + more
        if added is None:
            return None
        return output + added.reshape(output.shape).to(output.dtype)

    def _dense_scores(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        now = self.session.now
        if now is None:
            return None
        scores, *rest = output
        weights, ids = scores.topk(self.s.top_k or 1, dim=-1)
        decision = self._decided(Decision(scores, ids, weights, self.logits), now)
        edited = torch.zeros_like(scores).scatter(-1, decision.ids, decision.weights.to(scores.dtype))
        return (edited, *rest)

    def _decided(self, decision: Decision, now: Now) -> Decision:
        if len(decision.ids) != now.ids.numel():
            raise RunError(
                f"the decisions of layer {self.s.layer} are not those of the tokens fed",
                expected=f"{now.ids.numel()} tokens",
                found=f"{len(decision.ids)}",
                fix="edit this model without decision edits at this layer",
            )
        if decision.logits is not None:
            decision.logits = decision.logits.to(decision.ids.device)
        self.logits = None
        live = [step for step in self.program if step.live]
        asking = [step for step in live if isinstance(step, RouterStep)]
        if asking:
            rule = asking[0].place.rule
            assert rule is not None
            view = view_of(decision, rule)
            for step in asking:
                step.ask(view, now)
            settle(rule, view, decision)
        for changing in live:
            if not isinstance(changing, RouterStep):
                changing.decide(decision, now)
        self.added = decision.added
        self.taken = decision if any(step.after for step in live) else None
        return decision


Pair = tuple[torch.Tensor, torch.Tensor]


def _read_plain(ids: torch.Tensor, weights: torch.Tensor, _s: Sublayer) -> Pair:
    return ids, weights


def _write_plain(decision: Decision, ids: torch.Tensor, _weights: torch.Tensor, _s: Sublayer) -> Pair:
    return decision.ids.to(ids.dtype), decision.weights


def _read_skipping(ids: torch.Tensor, weights: torch.Tensor, s: Sublayer) -> Pair:
    return torch.where(weights == 0, s.n_experts or 0, ids), weights


def _write_skipping(decision: Decision, ids: torch.Tensor, weights: torch.Tensor, s: Sublayer) -> Pair:
    none = decision.ids >= (s.n_experts or 0)
    return torch.where(none, 0, decision.ids).to(ids.dtype), torch.where(none, 0, decision.weights).to(weights.dtype)


_READ: dict[str, Callable[[torch.Tensor, torch.Tensor, Sublayer], Pair]] = {
    "experts": _read_plain,
    "skipping": _read_skipping,
}
_WRITE: dict[str, Callable[[Decision, torch.Tensor, torch.Tensor, Sublayer], Pair]] = {
    "experts": _write_plain,
    "skipping": _write_skipping,
}
