"""What each part of a model adds to the logits that a readout asks: every part's output along the directions read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import nn

from moescope.core.errors import InputError
from moescope.core.sites import ATTN_OUT, EXPERT_OUT, HEAD_Z, RESID_POST, RESID_PRE, SHARED_OUT, Site
from moescope.probes.anatomy import Sublayer
from moescope.probes.attention_taps import attention_sites
from moescope.probes.attribution.logit_norms import FrozenNorm, frozen_norm, identity, tolerance
from moescope.probes.attribution.logit_readout import Readout
from moescope.probes.block_outputs import Contribution, contributions
from moescope.probes.forward import DeviceBatch, logits_of
from moescope.probes.live_model import LiveModel
from moescope.probes.projections import output_projection
from moescope.probes.shared_expert_taps import routed_scale
from moescope.probes.taps import sites_of, tapped

Values = Float[torch.Tensor, "position target+1"]


@dataclass(frozen=True)
class Part:
    """What one part of the model adds.

    Attributes:
        component: embedding, attn, head, attn bias, expert, shared, mlp, or norm bias.
        layer, block: of a sublayer.
        head: of attention.
        expert: id at each position, of one slot of a router.
        values: added to each asked logit, and last to their mean over the vocabulary.
    """

    component: str
    values: Values
    layer: int | None = None
    block: str | None = None
    head: int | None = None
    expert: Int[torch.Tensor, " position"] | None = None


@torch.no_grad()
def parts(model: LiveModel, batch: DeviceBatch, read: Readout, *, heads: bool) -> tuple[list[Part], list[str]]:
    """Run the text again and take every part's output along the directions; nothing is kept but the values.

    Returns:
        The parts, and what could not be taken apart further, with the reason.

    Raises:
        InputError: a model whose blocks do something else with the stream than adding to it.
    """
    walk = _Walk(model, read, heads=heads)
    with walk:
        logits_of(model, batch)
    return walk.found, list(dict.fromkeys(walk.notes))


class _Walk:
    """One forward pass, block by block."""

    def __init__(self, model: LiveModel, read: Readout, *, heads: bool) -> None:
        self.model, self.read, self.heads = model, read, heads
        self.found: list[Part] = []
        self.notes: list[str] = []
        self.stack = ExitStack()
        self.held: dict[Site, dict[str, torch.Tensor]] = {}
        self.known: dict[int, dict[Site, Contribution]] = {}
        self.out: dict[tuple[Site, int], torch.Tensor] = {}  # as the model goes on with them: known again by identity
        self.raw: dict[tuple[Site, int], torch.Tensor] = {}  # at the asked positions
        self.follower: dict[Site, tuple[nn.Module, torch.Tensor]] = {}
        self.moe = {_added_at(s): s for s in model.anatomy.moe if s.block.startswith("mlp")}
        self.attention = {_added_at(s): s for s in model.anatomy.sublayers if s.kind == "attention"}
        self.at: list[int] = list(read.positions)
        self.device = read.directions.device
        self.place: dict[int, torch.device] = {}  # of each block's weights

    def __enter__(self) -> None:
        module, anatomy = self.model.module, self.model.anatomy
        there = set(sites_of(module, anatomy))
        wanted: list[Site] = []
        for layer, path in enumerate(anatomy.block_paths):
            self.known[layer] = contributions(module, anatomy, layer)
            wanted += [Site(layer, "", RESID_PRE), *self.known[layer], Site(layer, "", RESID_POST)]
            self._watch(module.get_submodule(path), self.known[layer])
            self.place[layer] = next((p.device for p in module.get_submodule(path).parameters()), self.device)
        wanted += [Site(s.layer, s.block, name) for s in self.moe.values() for name in (EXPERT_OUT, SHARED_OUT)]
        if self.heads:
            shown = attention_sites(module, anatomy)
            wanted += [z for s in self.attention.values() if (z := Site(s.layer, s.block, HEAD_Z)) in shown]
        sites = [site for site in wanted if site in there]
        self.stack.enter_context(tapped(module, anatomy, sites, self._receive))

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def _watch(self, block: nn.Module, known: dict[Site, Contribution]) -> None:
        """Note what sublayers give before the child of the block that norms it, and which child that is."""
        inside: set[int] = set()
        for site, contribution in known.items():
            for n, part in enumerate(contribution.modules):
                inside |= {id(m) for m in part.modules()}
                self.stack.callback(part.register_forward_hook(self._note(site, n)).remove)
        for child in block.children():
            if not any(id(m) in inside for m in child.modules()):
                self.stack.callback(child.register_forward_hook(self._follow).remove)

    def _note(self, site: Site, n: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            out = output[0] if isinstance(output, (tuple, list)) else output
            self.out[site, n], self.raw[site, n] = out, self._asked(out)

        return hook

    def _follow(self, module: nn.Module, inputs: tuple[Any, ...], _output: Any) -> None:
        for (site, n), out in self.out.items():
            if len(inputs) == 1 and inputs[0] is out:
                self.follower[site] = module, self.raw[site, n]

    def _asked(self, tensor: torch.Tensor) -> torch.Tensor:
        """The asked positions, whatever lies before the width."""
        return tensor.reshape(-1, tensor.shape[-1])[self.at].to(self.device)

    def _receive(self, site: Site, tensors: dict[str, torch.Tensor]) -> None:
        if site.tensor == EXPERT_OUT:
            self.held[site] = {name: tensors[name][self.at].to(self.device) for name in ("out", "indices", "weights")}
        elif site.tensor == HEAD_Z:
            self.held[site] = {"z": tensors["z"][0][self.at].to(self.device)}
        else:
            self.held[site] = {"out": self._asked(next(iter(tensors.values()))).clone()}
        if site.tensor == RESID_POST:
            self._block(site.layer)
            for kept in (self.held, self.out, self.raw, self.follower):
                kept.clear()

    def _block(self, layer: int) -> None:
        """Take the parts of a block that has run."""
        before, after = (self.held[Site(layer, "", name)]["out"] for name in (RESID_PRE, RESID_POST))
        if layer == 0:
            self.found.append(Part("embedding", self._along(self.read.directions, before)))
        left = after.double() - before.double()
        for site in self.known[layer]:
            added = self.held[site]["out"]
            left -= added.double()
            self.found += self._sublayer(site, added)
        if float(left.abs().max()) > 2 * tolerance(after.dtype) * float(after.abs().max()):
            raise InputError(
                "the logits of this model cannot be taken apart",
                found=f"block {layer} does something else with the residual stream than adding to it",
                fix="measure the effect of ablations instead",
            )

    def _sublayer(self, site: Site, added: torch.Tensor) -> Iterator[Part]:
        s = self.attention.get(site) or self.moe.get(site)
        block = s.block if s is not None else site.block or ("attn" if site.tensor == ATTN_OUT else "mlp")
        whole = Part(
            "attn" if site.tensor == ATTN_OUT else "mlp", self._along(self.read.directions, added), site.layer, block
        )
        if s is None or (s.kind == "attention" and not self.heads):
            yield whole
            return
        raw = sum(self.raw[site, n].double() for n in range(len(self.known[site.layer][site].modules)))
        assert isinstance(raw, torch.Tensor)
        norm = self._norm(site, raw, added)
        if norm is None:
            self.notes.append(
                f"The output of {s.block} in layer {site.layer} is not told apart: what follows it is no norm."
            )
        pieces = None if norm is None else self._pieces(s, raw, norm.back(self.read.directions))
        if norm is None or pieces is None:
            yield whole
            return
        yield from pieces
        if bool(norm.bias.any()):
            yield Part("norm bias", self.read.directions @ norm.bias, site.layer, block)

    def _norm(self, site: Site, raw: torch.Tensor, added: torch.Tensor) -> FrozenNorm | None:
        """What lies between the sublayer's output and the stream, as a linear map."""
        factor = self.known[site.layer][site].factor
        if factor is not None:
            zeros = torch.zeros(1, 1, raw.shape[-1], dtype=added.dtype, device=self.place[site.layer])
            shift = factor(zeros).to(raw).reshape(-1)
            found = FrozenNorm(factor(zeros + 1).to(raw).reshape(-1) - shift, shift, False, identity(raw).scale)
        elif site in self.follower:
            module, given = self.follower[site]
            return frozen_norm(module, given, added)
        else:
            found = identity(raw)
        far = float((found(raw) - added.double()).abs().max())
        return found if far <= tolerance(added.dtype) * float(added.abs().max()) else None

    def _pieces(self, s: Sublayer, raw: torch.Tensor, directions: torch.Tensor) -> list[Part] | None:
        """Heads of attention, or slots and shared experts of a router; None where they do not make up the output."""
        pieces, total = self._of_heads(s, directions) if s.kind == "attention" else self._of_experts(s, directions)
        what = "heads" if s.kind == "attention" else "experts"
        if total is None:
            reason = s.unreachable or "their vectors cannot be read"
            self.notes.append(f"The {what} of layer {s.layer} are not told apart: {reason}.")
            return None
        if float((total - raw).abs().max()) > tolerance(self.model.dtype) * float(raw.abs().max()):
            self.notes.append(
                f"The {what} of layer {s.layer} are not told apart: their sum is not what {s.block} adds."
            )
            return None
        return pieces

    def _of_heads(self, s: Sublayer, directions: torch.Tensor) -> tuple[list[Part], torch.Tensor | None]:
        z = self.held.get(Site(s.layer, s.block, HEAD_Z), {}).get("z")
        end = output_projection(self.model.module.get_submodule(s.path), self.model.anatomy.d_model)
        weight: Any = getattr(end, "weight", None)
        if z is None or not isinstance(weight, torch.Tensor) or weight.ndim != 2:
            return [], None
        matrix = (
            (weight.T if type(end).__name__ == "Conv1D" else weight).to(self.device).double()
        )  # [d_model, head · d_head]
        flat = z.flatten(1).double()
        if matrix.shape != (self.model.anatomy.d_model, flat.shape[1]):
            return [], None
        bias: Any = getattr(end, "bias", None)
        back = (directions @ matrix).reshape(*directions.shape[:2], *z.shape[1:])  # [position, target, head, d_head]
        values = (back * z.double()[:, None]).sum(-1)
        found = [Part("head", values[..., h], s.layer, s.block, head=h) for h in range(z.shape[1])]
        total = flat @ matrix.T
        if bias is not None:
            total = total + bias.to(total)
            found.append(Part("attn bias", directions @ bias.to(total), s.layer, s.block))
        return found, total

    def _of_experts(self, s: Sublayer, directions: torch.Tensor) -> tuple[list[Part], torch.Tensor | None]:
        slots = self.held.get(Site(s.layer, s.block, EXPERT_OUT))
        if slots is None:
            return [], None
        moe = self.model.module.get_submodule(s.path)
        weighted = slots["out"].double() * slots["weights"].double()[..., None] * routed_scale(moe)
        if weighted.shape[-1] != directions.shape[-1]:  # experts of a latent width, led back by one map for all
            up: Any = getattr(moe, "fc2_latent_proj", None)
            if up is None or getattr(up, "bias", None) is not None:
                return [], None
            weighted = weighted @ up.weight.to(weighted).T
        values = torch.einsum("ptd,pkd->pkt", directions, weighted)
        ids = slots["indices"]
        found = [Part("expert", values[:, k], s.layer, s.block, expert=ids[:, k]) for k in range(weighted.shape[1])]
        total = weighted.sum(1)
        shared = self.held.get(Site(s.layer, s.block, SHARED_OUT))
        if shared is not None:
            found.append(Part("shared", self._along(directions, shared["out"]), s.layer, s.block))
            total = total + shared["out"].double()
        return found, total

    @staticmethod
    def _along(directions: torch.Tensor, vectors: torch.Tensor) -> Values:
        return torch.einsum("ptd,pd->pt", directions, vectors.double())


def _added_at(s: Sublayer) -> Site:
    """Where a sublayer's contribution to the stream is read."""
    tensor = ATTN_OUT if s.block.startswith("attn") else "hook_mlp_out"
    return Site(s.layer, "" if s.block in ("attn", "mlp") else s.block, tensor)
