"""Who writes a massive activation: its value taken apart into what every head, neuron and expert adds to that channel.

The residual stream is a sum, so that at one token and channel the value after a block is exactly that of the embedding plus
what every sublayer up to there adds; attention's part is a sum over heads of z · W_O, a dense MLP's a sum over its neurons of
a · W_down, an MoE layer's a sum over the chosen experts of weight · output. What a sublayer's norm or factor does behind its
last projection scales its parts alike; biases and what is left of the sum are parts of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from moescope.core.errors import InputError
from moescope.core.sites import (
    ATTN_OUT,
    DENSE_POST,
    EXPERT_OUT,
    HEAD_Z,
    MLP_OUT,
    RESID_POST,
    RESID_PRE,
    SHARED_OUT,
    Site,
)
from moescope.probes.anatomy import Sublayer
from moescope.probes.batches import Batch
from moescope.probes.forward import logits_of, to_device
from moescope.probes.live_model import LiveModel
from moescope.probes.projections import down_projection, output_projection, widths
from moescope.probes.shared_expert_taps import routed_scale
from moescope.probes.taps import sites_of, tapped

_PARTS = 64  # of a sublayer, the largest: a model may have millions of neurons
Kind = Literal["embedding", "head", "neuron", "expert", "bias", "rest", "sublayer"]


@dataclass(frozen=True)
class Place:
    """Where a massive activation stands in one sequence.

    Attributes:
        sequence_id: of the sequence.
        layer: of the block after which it is looked at.
        position: 0-based in the sequence.
        channel: of the residual stream.
    """

    sequence_id: int
    layer: int
    position: int
    channel: int


@dataclass(frozen=True)
class Part:
    """One part of the value, as a mean over sequences.

    Attributes:
        kind: `embedding`; `head`, `neuron` or `expert`, with its `number` (shared experts −1); `bias`, of the last projection;
            `sublayer`, one that cannot be taken apart; `rest`, the value less all parts.
        layer, block: of the sublayer; −1 and "" for the embedding and the rest.
        number: of the head, neuron or expert; −1 where there is none.
        value: mean of what it adds to the channel, in units of activation.
        share: of the whole value.
    """

    kind: Kind
    layer: int
    block: str
    number: int
    value: float
    share: float


@dataclass(frozen=True)
class Origin:
    """A massive activation taken apart.

    Attributes:
        layer, channel: where it stands.
        value: its mean over sequences, signed.
        parts: largest first by |value|; of one sublayer up to 64.
        sequences: how many were taken apart.
    """

    layer: int
    channel: int
    value: float
    parts: tuple[Part, ...]
    sequences: int

    @property
    def rest(self) -> float:
        """What the parts leave of the value, as a share: 0 up to rounding where the stream is their sum."""
        return next((part.share for part in self.parts if part.kind == "rest"), 0.0)

    def writers(self, most: int = 4, enough: float = 0.9) -> tuple[Part, ...]:
        """The largest heads, neurons or experts of the sublayer that adds most, until they make up `enough` of what its parts add
        in the direction of the value.

        Args:
            most: never more than so many.
            enough: share of what those parts add together.
        """
        able = [part for part in self.parts if part.kind in ("head", "neuron", "expert") and part.share > 0]
        if not able:
            return ()
        first = able[0]
        same = [part for part in able if (part.layer, part.block, part.kind) == (first.layer, first.block, first.kind)]
        goal = enough * sum(part.share for part in same)
        found: list[Part] = []
        for part in same[:most]:
            found.append(part)
            if sum(p.share for p in found) >= goal:
                break
        return tuple(found)


def take_apart(model: LiveModel, batches: Iterable[Batch], places: Sequence[Place]) -> Origin:
    """Take massive activations of one channel after one block apart, a place a sequence.

    Args:
        model: what runs.
        batches: those that hold the sequences; others are passed over.
        places: at most one a sequence, all of one layer and channel.

    Raises:
        InputError: no place, places of several layers or channels, a model without a residual stream of one vector a token.

    Example:
        >>> import moescope as ms
        >>> from moescope.probes.batches import BatchPlan
        >>> from moescope.probes.corpus import Corpus
        >>> model = ms.load("demo")
        >>> plan = BatchPlan(Corpus.load(["Hello world."]), model.tokenizer, 1, 64)
        >>> origin = take_apart(model, plan, [Place(0, 2, 0, 5)])
        >>> abs(origin.rest) < 1e-3
        True
    """
    where = {(p.layer, p.channel) for p in places}
    if len(where) != 1 or len({p.sequence_id for p in places}) != len(places):
        raise InputError(
            "a massive activation is taken apart after one block and in one channel, at one place a sequence",
            found=f"{len(places)} places after {len({p.layer for p in places})} blocks",
        )
    if model.anatomy.no_stream is not None:
        raise InputError(f"{model.name} has no residual stream to take apart", found=model.anatomy.no_stream)
    (layer, channel), position = where.pop(), {p.sequence_id: p.position for p in places}
    reader = _Reader(model, layer, channel)
    for batch in batches:
        rows = [row for row, s in enumerate(batch.sequences) if s.sequence_id in position]
        if rows:
            reader.read(batch, rows, [position[batch.sequences[row].sequence_id] for row in rows])
    return reader.origin()


class _Reader:
    """Runs batches under taps and adds up what passes at the places."""

    def __init__(self, model: LiveModel, layer: int, channel: int) -> None:
        self.model, self.layer, self.channel = model, layer, channel
        anatomy, known = model.anatomy, set(sites_of(model.module, model.anatomy))
        wanted = [Site(0, "", RESID_PRE), Site(layer, "", RESID_POST)]
        self.sublayers: list[tuple[Site, Sublayer, list[Site]]] = []
        for s in (s for s in anatomy.sublayers if s.layer <= layer):
            mixer = s.block.startswith("attn")
            site = Site(s.layer, "" if s.block in ("attn", "mlp") else s.block, ATTN_OUT if mixer else MLP_OUT)
            if site not in known or any(site == other for other, _, _ in self.sublayers):
                continue
            inner = [
                Site(s.layer, s.block, name) for name in ((HEAD_Z,) if mixer else (DENSE_POST, EXPERT_OUT, SHARED_OUT))
            ]
            inner = [i for i in inner if i in known]
            self.sublayers.append((site, s, inner))
            wanted += [site, *inner]
        self.sites = wanted
        self.moes = {Site(s.layer, s.block, EXPERT_OUT): model.module.get_submodule(s.path) for s in anatomy.moe}
        self.seen: dict[Site, torch.Tensor] = {}
        self.sums: dict[tuple[Kind, int, str], NDArray[np.float64]] = {}  # by number
        self.total, self.sequences = 0.0, 0

    def read(self, batch: Batch, rows: Sequence[int], positions: Sequence[int]) -> None:
        given = to_device(batch, self.model)
        width = given.ids.shape[1]
        row, position = (torch.tensor(list(n), device=given.ids.device) for n in (rows, positions))
        flat = row * width + position

        def receive(site: Site, tensors: dict[str, torch.Tensor]) -> None:
            tensor = next(tensors[n] for n in ("resid", "out", "z", "post") if n in tensors).detach()
            in_rows = tensor.shape[:2] == given.ids.shape
            tensor = (tensor.flatten(0, 1) if in_rows else tensor).index_select(0, flat.to(tensor.device))
            if site.tensor == EXPERT_OUT:
                picked = [tensors[n].index_select(0, flat.to(tensor.device)) for n in ("indices", "weights")]
                moe = self.moes[site]
                at = self._in_channel(moe, tensor)
                if at is None:
                    return  # the sublayer stays in one piece
                tensor = torch.stack([picked[0].double(), picked[1].double() * at * routed_scale(moe)])
            self.seen[site] = tensor.double().cpu()  # a few rows

        with torch.no_grad(), tapped(self.model.module, self.model.anatomy, self.sites, receive):
            logits_of(self.model, given)
        self._add(len(rows))
        self.seen.clear()

    def _in_channel(self, moe: nn.Module, out: torch.Tensor) -> torch.Tensor | None:
        """[row, slot] what slots put out in the channel; None where experts work in a width that leads there in an unknown way."""
        if out.shape[-1] == self.model.anatomy.d_model:
            return out[..., self.channel].double()
        up: Any = getattr(moe, "fc2_latent_proj", None)
        if up is None or getattr(up, "bias", None) is not None:
            return None
        row: torch.Tensor = up.weight[self.channel]
        return out.double() @ row.to(out.device).double()

    def _add(self, rows: int) -> None:
        c = self.channel
        start, end = self.seen[Site(0, "", RESID_PRE)][:, c], self.seen[Site(self.layer, "", RESID_POST)][:, c]
        self.total += float(end.sum())
        self.sequences += rows
        self._put("embedding", -1, "", start[:, None])
        left = end - start
        for site, s, inner in self.sublayers:
            if site not in self.seen:
                continue
            added = self.seen[site][:, c]
            left = left - added
            self._sublayer(s, inner, added)
        self._put("rest", -1, "", left[:, None])

    def _sublayer(self, s: Sublayer, inner: list[Site], added: torch.Tensor) -> None:
        """What one sublayer adds, part by part."""
        parts: dict[Kind, torch.Tensor] = {}
        if s.kind == "moe" and any(site.tensor == EXPERT_OUT and site in self.seen for site in inner):
            parts = self._experts(s, inner)
        elif inner and s.kind != "moe" and (projection := _projection(self.model, s)) is not None:
            weight, bias = _row(projection, self.channel)
            values = self.seen[inner[0]]
            if s.block.startswith("attn"):
                parts["head"] = (values.flatten(1) * weight).reshape(*values.shape[:2], -1).sum(-1)
            else:
                parts["neuron"] = values * weight
            if bias:
                parts["bias"] = torch.full_like(added[:, None], bias)
        if not parts:
            self._put("sublayer", s.layer, s.block, added[:, None])
            return
        raw = torch.cat(list(parts.values()), 1).sum(1)
        scale = torch.where(raw == 0, torch.ones_like(raw), added / raw)
        for kind, values in parts.items():
            self._put(kind, s.layer, s.block, values * scale[:, None])

    def _experts(self, s: Sublayer, inner: list[Site]) -> dict[Kind, torch.Tensor]:
        """By expert; shared experts come after the last."""
        found = torch.zeros(0)
        for site in inner:
            if site.tensor == EXPERT_OUT:
                ids, products = self.seen[site]
                known = (ids >= 0) & (ids < s.n_choices)
                found = products.new_zeros(len(products), s.n_choices + 1)
                found.scatter_add_(1, torch.where(known, ids, s.n_choices).long(), torch.where(known, products, 0.0))
        for site in inner:
            if site.tensor == SHARED_OUT:
                found[:, -1] += self.seen[site][:, self.channel]
        return {"expert": found}

    def _put(self, kind: Kind, layer: int, block: str, values: torch.Tensor) -> None:
        total = values.sum(0).numpy()
        self.sums[kind, layer, block] = self.sums.get((kind, layer, block), 0.0) + total

    def origin(self) -> Origin:
        """All parts, largest first."""
        if not self.sequences:
            raise InputError("none of the places is in the texts", fix="give the batches that hold the sequences")
        n, value = self.sequences, self.total / self.sequences
        parts = []
        for (kind, layer, block), totals in self.sums.items():
            largest = np.argsort(-np.abs(totals), kind="stable")[:_PARTS]
            single = kind not in ("head", "neuron", "expert")
            for number in largest[totals[largest] != 0]:
                shared = kind == "expert" and number == len(totals) - 1
                name = -1 if single or shared else int(number)
                added = float(totals[number]) / n
                parts.append(Part(kind, layer, block, name, added, added / value if value else 0.0))
        parts.sort(key=lambda part: -abs(part.value))
        return Origin(self.layer, self.channel, value, tuple(parts), n)


def _projection(model: LiveModel, s: Sublayer) -> nn.Module | None:
    if s.block.startswith("attn"):
        return output_projection(model.module.get_submodule(s.path), model.anatomy.d_model)
    return down_projection(model.module, s.path, model.anatomy.d_model) if s.kind == "dense" else None


def _row(projection: nn.Module, channel: int) -> tuple[torch.Tensor, float]:
    """The weights into one channel, and its bias."""
    weight: Any = projection.weight
    size = widths(projection)
    rows = size is not None and weight.shape == (size[1], size[0]) and hasattr(projection, "in_features")
    row = weight[channel] if rows else weight[:, channel]
    bias: Any = getattr(projection, "bias", None)
    return row.detach().double().cpu(), 0.0 if bias is None else float(bias.detach()[channel])
