"""What an MLP or a block of experts is given, after the norm: which module takes it."""

from __future__ import annotations

from torch import nn

from moescope.core.sites import MLP_IN, Site
from moescope.probes.anatomy import Anatomy, Sublayer
from moescope.probes.block_outputs import contributions, runs_again
from moescope.probes.projections import widths


def mlp_inputs(model: nn.Module, anatomy: Anatomy) -> dict[Site, nn.Module]:
    """Site of each MLP's or MoE block's input → the module whose first argument it is.

    That is the sublayer's own module; where that one norms the stream itself before it goes on (T5, Switch), the module in it
    that is given the normed stream.

    Example:
        >>> import moescope as ms
        >>> model = ms.load("demo")
        >>> [str(site) for site in mlp_inputs(model.module, model.anatomy)][:2]
        ['blocks.0.mlp.hook_in', 'blocks.1.mlp.hook_in']
    """
    return {
        Site(s.layer, s.block, MLP_IN): _taking(model, anatomy, s)
        for s in _mlps(anatomy)
        if why_no_input(model, anatomy, s) is None
    }


def input_refusals(model: nn.Module, anatomy: Anatomy) -> dict[Site, str]:
    """Inputs of MLPs and MoE blocks that this model's family does not offer, with the reason."""
    found = {Site(s.layer, s.block, MLP_IN): why_no_input(model, anatomy, s) for s in _mlps(anatomy)}
    return {site: reason for site, reason in found.items() if reason is not None}


def why_no_input(model: nn.Module, anatomy: Anatomy, s: Sublayer) -> str | None:
    """Why a sublayer's input is at no module; None where it is."""
    if runs_again(model.get_submodule(anatomy.block_paths[s.layer])):
        return "its blocks run several times in one pass"
    if s.path in anatomy.block_paths:
        return "its experts lie right in the block, and router and experts are given different things"
    return None


def _mlps(anatomy: Anatomy) -> list[Sublayer]:
    taken: set[str] = set()
    found = []
    for s in anatomy.sublayers:
        if s.block.partition(".")[0] == "mlp" and s.kind in ("moe", "dense") and s.path not in taken:
            taken.add(s.path)  # a second router of one module has no input of its own
            found.append(s)
    return found


def _taking(model: nn.Module, anatomy: Anatomy, s: Sublayer) -> nn.Module:
    module = model.get_submodule(s.path)
    inside = {id(part) for part in module.modules()} - {id(module)}
    for contribution in contributions(model, anatomy, s.layer).values():
        for part in contribution.modules:
            if id(part) in inside and widths(part) is None:
                return part
    return module
