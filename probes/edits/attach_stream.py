"""Steps of the stream put into a block: hooks that change what it is given, what it hands on, and what its sublayers add.

Every hook stands before those that are there already, so that whatever looks at the model sees what the edited model did.
What a sublayer adds may pass a norm first, which is found while the block runs: the child that is handed the output. The
output is changed when it comes; where a child of the block is then called with it, the tensor gets its own numbers back, and
what that child gives is changed instead.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moescope.core.errors import RunError
from moescope.core.sites import RESID_POST, RESID_PRE, Site
from moescope.probes.anatomy import Anatomy
from moescope.probes.block_outputs import Contribution, changes_in_place, contributions
from moescope.probes.edits.now import Now
from moescope.probes.edits.passages import PASSAGES, passage_at, passage_hooks
from moescope.probes.edits.step import StreamStep
from moescope.probes.edits.steps.features import FeatureStep, Watching
from moescope.probes.edits.steps.skip import SkipStep

Steps = Sequence[StreamStep[Any] | Watching]


class Editing(Protocol):
    """What hooks of edits ask of the session that put them in.

    Attributes:
        module, anatomy: the model and what it is made of.
        now: the pass that runs; None for one that is not edited.
    """

    module: nn.Module
    anatomy: Anatomy

    @property
    def now(self) -> Now | None:
        """The pass that runs."""


def attach_stream(stack: ExitStack, session: Editing, layer: int, program: Sequence[StreamStep[Any]]) -> None:
    """Put the steps of a layer into its block until `stack` closes.

    Args:
        stack: gets a callback for every hook.
        session: tells of the pass that runs.
        layer: of the block.
        program: its steps, at whatever sites, in the order in which they act.
    """
    block = session.module.get_submodule(session.anatomy.block_paths[layer])
    sites: defaultdict[str, list[StreamStep[Any] | Watching]] = defaultdict(list)
    for step in program:
        sites[step.site].append(step)  # type: ignore[attr-defined]  # every step of the stream has a site
    for step in program:
        if isinstance(step, FeatureStep) and step.reads is not None:
            sites[step.reads].append(Watching(step))
    whole = _WholeBlock(block, session, sites.pop(RESID_PRE, []), sites.pop(RESID_POST, []))
    handles = [*whole.hooks()]
    for site, contribution in contributions(session.module, session.anatomy, layer).items():
        # A block with two attentions: all are left out, and the first is what other steps change.
        steps = [s for s in sites.get(site.tensor, ()) if not site.block or isinstance(s, SkipStep)]
        if steps:
            handles += _Addend(block, session, site, contribution, steps).hooks()
    for where in PASSAGES:
        passage = passage_at(session.module, session.anatomy, layer, where) if where in sites else None
        if passage is not None:
            handles += passage_hooks(passage, session, sites[where])
    for handle in handles:
        stack.callback(handle.remove)


class _WholeBlock:
    """What a block is given and what it hands on."""

    def __init__(self, block: nn.Module, session: Editing, before: Steps, after: Steps) -> None:
        self.block, self.session, self.before, self.after = block, session, before, after
        self.skips = any(isinstance(step, SkipStep) for step in after)
        self.copies = self.skips and changes_in_place(block)
        self.entered: torch.Tensor | None = None

    def hooks(self) -> Iterator[RemovableHandle]:
        if self.before or self.skips:
            yield self.block.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)
        if self.after:
            yield self.block.register_forward_hook(self._leave, prepend=True)

    def _enter(self, _module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        now = self.session.now
        if now is None:
            return None
        name = "hidden_states" if "hidden_states" in named else next(iter(named), "")
        resid = inputs[0] if inputs else named[name]
        for step in self.before:
            resid = step.change(_fitting(resid, now), now)
        if self.skips:
            self.entered = resid.clone() if self.copies else resid
        return ((resid, *inputs[1:]), named) if inputs else (inputs, {**named, name: resid})

    def _leave(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        now = self.session.now
        if now is None:
            return None
        resid = _fitting(_first(output), now)
        for step in self.after:
            if isinstance(step, SkipStep):
                assert self.entered is not None
                resid = step.towards(self.entered.to(resid.device), resid, now)
            else:
                resid = step.change(resid, now)
        self.entered = None
        return _replaced(output, resid)


class _Addend:
    """What a sublayer adds to the stream: the sum of its modules' outputs, after the child that norms it, times a factor."""

    def __init__(
        self, block: nn.Module, session: Editing, site: Site, contribution: Contribution, steps: Steps
    ) -> None:
        self.block, self.session, self.site, self.steps = block, session, site, steps
        self.modules, self.factor = contribution.modules, contribution.factor
        self.outs: dict[int, torch.Tensor] = {}
        self.given: torch.Tensor | None = None  # what the model goes on with: known again by identity
        self.own: torch.Tensor | None = None  # the same without the edits
        self.followed = False

    def hooks(self) -> Iterator[RemovableHandle]:
        yield self.block.register_forward_pre_hook(self._begin, prepend=True)
        for number, module in enumerate(self.modules):
            yield module.register_forward_hook(self._part(number), prepend=True)
        inside = {id(m) for part in self.modules for m in part.modules()}
        for child in self.block.children():
            if not any(id(m) in inside for m in child.modules()):
                yield child.register_forward_pre_hook(self._before_follower, prepend=True)
                yield child.register_forward_hook(self._after_follower, prepend=True)
        yield self.block.register_forward_hook(self._end, prepend=True)

    def _begin(self, _module: nn.Module, _inputs: Any) -> None:
        self._forget()

    def _end(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        self._forget()

    def _forget(self) -> None:
        self.outs.clear()
        self.given = self.own = None
        self.followed = False

    def _part(self, number: int) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            now = self.session.now
            if now is None:
                return None
            self.outs[number] = _first(output)
            if len(self.outs) < len(self.modules):
                return None
            return _replaced(output, self._changed(self.outs.pop(number), now))

        return hook

    def _before_follower(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self.given is not None and len(inputs) == 1 and inputs[0] is self.given and self.own is not None:
            self.given.copy_(self.own)
            self.followed = True

    def _after_follower(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        now = self.session.now
        if not self.followed or now is None:
            return None
        self.followed = False
        self.outs.clear()  # the norm's output alone is what is added
        return _replaced(output, self._changed(_first(output), now))

    def _changed(self, last: torch.Tensor, now: Now) -> torch.Tensor:
        """What the last module must give so that the block adds what the steps make of its addend."""
        place = last.shape if last.ndim == 3 else (*now.mask.shape, last.shape[-1])
        total = sum((out.reshape(place) for out in self.outs.values()), start=last.reshape(place))
        added = total if self.factor is None else self.factor(total)
        wanted = _fitting(added, now)
        for step in self.steps:
            wanted = step.change(wanted, now)
        if self.factor is not None:
            shift = self.factor(torch.zeros_like(total))
            slope = self.factor(torch.ones_like(total)) - shift
            wanted = torch.where((wanted == added) | (slope == 0), total, (wanted - shift) / slope)
        if self.outs:
            others = sum((out.reshape(place) for out in self.outs.values()), start=torch.zeros_like(total))
            wanted = torch.where(wanted == total, last.reshape(place), wanted - others)
        self.own, self.given = last, wanted.reshape(last.shape)
        return self.given


def _fitting(stream: torch.Tensor, now: Now) -> torch.Tensor:
    if stream.shape[:2] != now.mask.shape:
        raise RunError(
            "an edit met a stream of another shape than the tokens that were fed",
            expected=f"[row, position] = {list(now.mask.shape)}",
            found=f"{list(stream.shape)}",
            fix="run the model on plain batches of tokens, one sequence a row",
        )
    return stream


def _first(output: Any) -> torch.Tensor:
    found: torch.Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return found


def _replaced(output: Any, first: torch.Tensor) -> Any:
    return type(output)((first, *output[1:])) if isinstance(output, (tuple, list)) else first
