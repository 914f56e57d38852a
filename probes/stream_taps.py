"""Taps on the residual stream, on what sublayers add to it, on what MLPs are given, on dense neurons and shared experts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import nn
from torch.utils.hooks import RemovableHandle

from moescope.core.errors import RunError
from moescope.core.sites import ATTN_OUT, DENSE_POST, MLP_IN, MLP_OUT, RESID_POST, RESID_PRE, SHARED_OUT, Site
from moescope.probes.anatomy import Anatomy
from moescope.probes.block_outputs import Contribution, changes_in_place, contributions, runs_again, why_no_stream
from moescope.probes.mlp_inputs import input_refusals, mlp_inputs
from moescope.probes.projections import down_projection
from moescope.probes.shared_expert_taps import shared_experts, tap_shared_experts

Receive = Callable[[Site, dict[str, torch.Tensor]], None]
_STREAM = (RESID_PRE, RESID_POST)


def stream_sites(model: nn.Module, anatomy: Anatomy) -> dict[Site, nn.Module]:
    """Every site of the stream, of sublayers' outputs, of MLPs' inputs, of dense neurons and of shared experts of a model.

    Returns:
        Site → the module at which it is read (of several that are summed, the first).

    Example:
        >>> import moescope as ms
        >>> model = ms.load("demo")
        >>> [str(site) for site in stream_sites(model.module, model.anatomy) if site.layer == 0 and not site.block]
        ['blocks.0.hook_resid_pre', 'blocks.0.hook_resid_post', 'blocks.0.hook_attn_out', 'blocks.0.hook_mlp_out']
        >>> [str(site) for site in stream_sites(model.module, model.anatomy) if site.layer == 0 and site.block]
        ['blocks.0.mlp.hook_in']
    """
    found: dict[Site, nn.Module] = {}
    for layer, path in enumerate(anatomy.block_paths):
        block = model.get_submodule(path)
        if why_no_stream(block) is None:
            found |= dict.fromkeys((Site(layer, "", name) for name in _STREAM), block)
            found |= {site: c.modules[0] for site, c in contributions(model, anatomy, layer).items()}
    found |= mlp_inputs(model, anatomy)
    found |= _down_projections(model, anatomy)
    found |= {site: shared.module for site, shared in shared_experts(model, anatomy).items()}
    return found


def stream_refusals(model: nn.Module, anatomy: Anatomy) -> dict[Site, str]:
    """Sites of the stream, of what is added to it and of MLPs' inputs that this model's family does not offer, and why."""
    found = input_refusals(model, anatomy)
    for layer, path in enumerate(anatomy.block_paths):
        reason = why_no_stream(model.get_submodule(path))
        if reason is not None:
            found |= dict.fromkeys((Site(layer, "", name) for name in (*_STREAM, ATTN_OUT, MLP_OUT)), reason)
    return found


@contextmanager
def tap_stream(model: nn.Module, anatomy: Anatomy, sites: Collection[Site], receive: Receive) -> Iterator[None]:
    """Call `receive(site, tensors)` whenever the model passes one of `sites`, which are among `stream_sites`.

    Tensors:
        `hook_resid_pre`, `hook_resid_post`: resid [row, position, d_model], what the block is given and what it hands on.
        `hook_attn_out`, `hook_mlp_out`: out [row, position, d_model], what the sublayer adds to the stream, after a norm
            that follows it and a factor on it (`moescope.probes.block_outputs`); it comes when its block has run.
            `resid_pre + Σ out = resid_post` wherever the block does nothing else with the stream.
        `mlp.hook_in`: given [row, position, d_model], what the MLP or MoE block is given, after the norm that stands before it
            (`moescope.probes.mlp_inputs`).
        `mlp.hook_post`: post [row, position, d_mlp], what the MLP's last projection is given.
        `mlp.shared_expert.hook_out`: out [row · position, d_model] or [row, position, d_model], what the shared experts
            add to the routed ones (`moescope.probes.shared_expert_taps`).

    All hooks are gone when the context ends, however it ends.

    Raises:
        RunError: a stream that is not [row, position, d_model], when the model runs.
    """
    layers: defaultdict[int, list[Site]] = defaultdict(list)
    for site in sites:
        layers[site.layer].append(site)
    inner = {site: ("post", module) for site, module in _down_projections(model, anatomy).items()}
    if any(site.tensor == MLP_IN for site in sites):
        inner |= {site: ("given", module) for site, module in mlp_inputs(model, anatomy).items()}
    with ExitStack() as stack:
        for layer, asked in layers.items():
            block = model.get_submodule(anatomy.block_paths[layer])
            known = contributions(model, anatomy, layer)
            wanted = {site: known[site] for site in asked if site in known}
            for handle in _BlockTap(block, anatomy.d_model, receive).hooks(
                wanted,
                {site: inner[site] for site in asked if site in inner},
                [site for site in asked if site.tensor in _STREAM],
            ):
                stack.callback(handle.remove)
        shared = [site for site in sites if site.tensor == SHARED_OUT]
        if shared:
            stack.enter_context(tap_shared_experts(model, anatomy, shared, receive))
        yield


class _BlockTap:
    """Hooks in one block; they share what the block was given and what its sublayers have put out so far."""

    def __init__(self, block: nn.Module, d_model: int, receive: Receive) -> None:
        self.block, self.d_model, self.receive = block, d_model, receive
        self.copies = changes_in_place(block)
        self.place: list[torch.Size] = []
        self.given: dict[tuple[Site, int], torch.Tensor] = {}  # what the model hands on: known again by identity
        self.kept: dict[tuple[Site, int], torch.Tensor] = {}

    def hooks(
        self, wanted: dict[Site, Contribution], inner: dict[Site, tuple[str, nn.Module]], stream: list[Site]
    ) -> Iterator[RemovableHandle]:
        yield self.block.register_forward_pre_hook(self._begin(stream), with_kwargs=True)
        parts = {(site, n): m for site, c in wanted.items() for n, m in enumerate(c.modules)}
        for part, module in parts.items():
            yield module.register_forward_hook(self._catch(part))
        if parts:
            for child in self._followers(list(parts.values())):
                yield child.register_forward_hook(self._follow)
        for site, (name, module) in inner.items():
            yield module.register_forward_pre_hook(self._entering(site, name), with_kwargs=True)
        yield self.block.register_forward_hook(self._end(wanted, stream))

    def _followers(self, sublayers: list[nn.Module]) -> Iterator[nn.Module]:
        """Children of the block that may follow a sublayer, as a norm does."""
        inside = {id(m) for sublayer in sublayers for m in sublayer.modules()}
        for child in self.block.children():
            if not any(id(m) in inside for m in child.modules()):
                yield child

    def _begin(self, stream: list[Site]) -> Callable[[nn.Module, Any, dict[str, Any]], None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            resid = inputs[0] if inputs else next(iter(named.values()))
            self.given.clear()
            self.kept.clear()
            self.place[:] = [resid.shape[:2]]
            for site in stream:
                if site.tensor == RESID_PRE:
                    self.receive(site, {"resid": self._checked(site, resid)})

        return hook

    def _catch(self, part: tuple[Site, int]) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self._keep(part, _first(output))

        return hook

    def _follow(self, _module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if len(inputs) != 1:  # with a second input it is the stream that comes out
            return
        for part, tensor in list(self.given.items()):
            if tensor is inputs[0]:
                self._keep(part, _first(output))

    def _keep(self, part: tuple[Site, int], tensor: torch.Tensor) -> None:
        self.given[part] = tensor
        self.kept[part] = tensor.clone() if self.copies else tensor

    def _entering(self, site: Site, name: str) -> Callable[[nn.Module, Any, dict[str, Any]], None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            self.receive(site, {name: self._by_row(inputs[0] if inputs else next(iter(named.values())))})

        return hook

    def _end(self, wanted: dict[Site, Contribution], stream: list[Site]) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            for site, contribution in wanted.items():
                parts = [self.kept.get((site, n)) for n in range(len(contribution.modules))]
                ran = [self._by_row(part) for part in parts if part is not None]
                if len(ran) < len(parts):
                    continue  # a sublayer that did not run: the ledger finds the gap
                total = sum(ran[1:], start=ran[0])
                out = total if contribution.factor is None else contribution.factor(total)
                self.receive(site, {"out": self._checked(site, out)})
            self.given.clear()
            self.kept.clear()
            for site in stream:
                if site.tensor == RESID_POST:
                    self.receive(site, {"resid": self._checked(site, _first(output))})

        return hook

    def _by_row(self, tensor: torch.Tensor) -> torch.Tensor:
        """[row, position, width]; some families lay rows end to end inside the block."""
        return tensor.reshape(*self.place[0], -1) if tensor.ndim == 2 else tensor

    def _checked(self, site: Site, tensor: Any) -> Float[torch.Tensor, "row position d_model"]:
        if not isinstance(tensor, torch.Tensor) or tensor.ndim != 3 or tensor.shape[-1] != self.d_model:
            raise RunError(
                f"{site} of this model is no residual stream",
                expected=f"[row, position, {self.d_model}]",
                found=f"{list(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__,
                fix="leave this site out",
            )
        return tensor


def _down_projections(model: nn.Module, anatomy: Anatomy) -> dict[Site, nn.Module]:
    found: dict[Site, nn.Module] = {}
    for s in anatomy.sublayers:
        again = runs_again(model.get_submodule(anatomy.block_paths[s.layer]))
        if s.kind == "dense" and not again and (down := down_projection(model, s.path, anatomy.d_model)) is not None:
            found[Site(s.layer, s.block, DENSE_POST)] = down
    return found


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) else output
