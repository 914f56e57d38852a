"""What of an autoencoder is held against experts: its latents' activity, and the directions it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from moescope.core.errors import InputError
from moescope.core.sites import ATTN_OUT, EXPERT_OUT, MLP_OUT, RESID_POST, RESID_PRE, Site
from moescope.probes.anatomy import Sublayer
from moescope.probes.live_model import LiveModel
from moescope.sae.autoencoder import Autoencoder
from moescope.sae.data.live import LivePass

MLP_IN = "hook_in"
Router = tuple[int, str]


@dataclass(frozen=True)
class Subject:
    """Some latents of an autoencoder.

    Attributes:
        autoencoder: whose.
        features: their numbers, on the host.
        index: the same, on the autoencoder's device.
        directions: unit decoder rows.
        norms: of the decoder rows.
        encoder: encoder columns, None where what it reads is not what it writes, or it has no such matrix.
    """

    autoencoder: Autoencoder
    features: tuple[int, ...]
    index: torch.Tensor
    directions: Float[torch.Tensor, "feature d_model"]
    norms: Float[torch.Tensor, " feature"]
    encoder: Float[torch.Tensor, "feature d_model"] | None

    @property
    def written_at(self) -> Site:
        """Where what it decodes belongs."""
        return self.autoencoder.target_site or self.autoencoder.site

    @property
    def by_slot(self) -> bool:
        """Whether its vectors are slots' outputs: one for each expert a token chose."""
        return self.autoencoder.site.tensor == EXPERT_OUT

    @torch.no_grad()
    def activity(self, found: LivePass) -> Float[torch.Tensor, "row feature"]:
        """Activations of the latents; rows are tokens, or token · slot of an autoencoder of slots."""
        given = found[self.autoencoder.site].vectors
        acts = self.autoencoder.encode(given.to(self.autoencoder.device).float())
        return acts if len(self.features) == acts.shape[-1] else acts.index_select(-1, self.index)


def subject_of(autoencoder: Autoencoder, model: LiveModel, features: Sequence[int] | None = None) -> Subject:
    """The latents asked for, all where None.

    Raises:
        InputError: a dense model, a width that is not the model's, latents that are not there, or an autoencoder of one expert.
    """
    if not model.anatomy.moe:
        raise InputError(f"{model.name} has no experts", expected="a mixture-of-experts model")
    if autoencoder.expert is not None:
        raise InputError(
            f"{autoencoder.name!r} is of expert {autoencoder.expert} alone",
            found="no other expert writes what it reads",
            fix="take an autoencoder of the block's output or of the stream",
        )
    decoder = autoencoder.decoder.float()
    if decoder.shape[1] != model.anatomy.d_model:
        raise InputError(
            f"{autoencoder.name!r} does not write into the stream of {model.name}",
            expected=f"decoder rows of {model.anatomy.d_model} components",
            found=f"{decoder.shape[1]}",
            fix="load the model it belongs to, or take an autoencoder of the stream or of a block's output",
        )
    numbers = tuple(range(len(decoder))) if features is None else tuple(dict.fromkeys(int(f) for f in features))
    if not numbers or min(numbers) < 0 or max(numbers) >= len(decoder):
        raise InputError(
            f"{autoencoder.name!r} has no such latents",
            expected=f"numbers from 0 to {len(decoder) - 1:,}",
            found=", ".join(map(str, numbers[:5])) or "none",
        )
    index = torch.tensor(numbers, device=decoder.device)
    rows = decoder.index_select(0, index)
    norms = rows.norm(dim=-1)
    column: Any = getattr(autoencoder.module, "W_enc", None)
    same = autoencoder.target_site in (None, autoencoder.site)
    reads = isinstance(column, torch.Tensor) and column.shape == decoder.T.shape and same
    encoder = column.detach().float().T.index_select(0, index) if reads else None
    return Subject(autoencoder, numbers, index, rows / norms.clamp(min=1e-12)[:, None], norms, encoder)


def routers_around(
    subject: Subject, model: LiveModel, layers: Sequence[int] | None
) -> tuple[list[Router], list[Router]]:
    """Routers whose experts write where an autoencoder decodes, and routers that its latents reach.

    A block's output is written by that block's experts alone; the stream by every block before. Latents of the stream, or of
    what is added to it, reach the routers behind it; those of a block's input reach that block's router.

    Args:
        subject: the latents.
        model: theirs.
        layers: those to look at; None for the nearest writers (the site's own block, or the last before it) and every router behind.

    Raises:
        InputError: layers without routers, or nothing that writes or is reached.
    """
    known = [s for s in model.anatomy.moe if s.block.startswith("mlp")]
    if layers is not None and (wrong := sorted(set(layers) - {s.layer for s in known})):
        raise InputError(
            f"layer {wrong[0]} has no router", expected=f"some of layers {sorted({s.layer for s in known})}"
        )
    site = subject.written_at
    writers = [s for s in known if _writes(s, site)]
    gates = [s for s in known if _reached(s, subject.autoencoder.site, site)]
    if layers is None:
        nearest = max((s.layer for s in writers), default=None)
        writers = [s for s in writers if s.layer == nearest]
    else:
        writers, gates = ([s for s in side if s.layer in set(layers)] for side in (writers, gates))
    if not writers and not gates:
        raise InputError(
            f"no expert writes into {site}, and no router reads what is written there",
            expected="an autoencoder of the stream, of a block's input or output, or of experts' outputs",
            fix="name other layers" if layers is not None else None,
        )
    return [(s.layer, s.block) for s in writers], [(s.layer, s.block) for s in gates]


def _writes(s: Sublayer, site: Site) -> bool:
    if s.unreachable is not None:
        return False
    if site.tensor == EXPERT_OUT:
        return (s.layer, s.block) == (site.layer, site.block)
    if site.tensor == MLP_OUT:
        return (s.layer, s.block) == (site.layer, site.block or "mlp")
    if site.tensor in (RESID_PRE, RESID_POST):
        return s.layer < site.layer or (s.layer == site.layer and site.tensor == RESID_POST)
    return False


def _reached(s: Sublayer, read: Site, site: Site) -> bool:
    if not s.has_logits or read.tensor == EXPERT_OUT:
        return False
    if site.tensor == MLP_IN:
        return (s.layer, s.block) == (site.layer, site.block or "mlp")
    if site.tensor in (RESID_PRE, ATTN_OUT):
        return s.layer >= site.layer
    return site.tensor in (RESID_POST, MLP_OUT) and s.layer > site.layer
