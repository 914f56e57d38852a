"""How sparse what one latent does to the logits is: latents taken out one at a time while the model runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float

from moescope.core.edit_kinds.stream import Add, StreamSite
from moescope.core.intervention import Intervention
from moescope.core.sites import Site
from moescope.probes.forward import logits_in
from moescope.probes.live_model import LiveModel
from moescope.sae.autoencoder import Autoencoder
from moescope.sae.judging.rows import ByDocument, MeasureRow
from moescope.sae.judging.run_tokens import RunTokens
from moescope.sae.judging.vectors import Vectors

EACH = 4  # latents a token
AHEAD = 16  # positions looked at, the token's own included


def edit_site(site: Site) -> str:
    """A site as edits of the stream call it.

    Example:
        >>> edit_site(Site(3, "", "hook_mlp_out")), edit_site(Site(3, "mlp", "hook_post"))
        ('hook_mlp_out', 'mlp.hook_post')
    """
    return f"{site.block}.{site.tensor}" if site.block else site.tensor


def written_at(autoencoder: Autoencoder) -> Site:
    """Where its reconstruction belongs: its own site, or what a transcoder predicts."""
    return autoencoder.target_site or autoencoder.site


def can_ablate(autoencoder: Autoencoder) -> bool:
    """Whether single latents can be taken out: where edits add vectors."""
    site, written = autoencoder.site, written_at(autoencoder)
    whole = autoencoder.expert is None and autoencoder.head is None and site.layer == written.layer
    return whole and {edit_site(site), edit_site(written)} <= set(get_args(StreamSite))


@dataclass(frozen=True)
class Ablations:
    """What taking single latents out did.

    Attributes:
        sparsity: [ablation] (L1 ÷ L2)² ÷ (V·T) of the changes of logits; beside it that of a random direction of equal norm.
        random: the same for random directions.
        document: [ablation] document of its token.
    """

    sparsity: np.ndarray[Any, np.dtype[np.float64]]
    random: np.ndarray[Any, np.dtype[np.float64]]
    document: np.ndarray[Any, np.dtype[np.int64]]


def ablated(model: LiveModel, autoencoder: Autoencoder, vectors: Vectors, tokens: RunTokens, *, seed: int) -> Ablations:
    """Take active latents out one at a time at some tokens, and compare the logits from there on.

    Args:
        model: live.
        autoencoder: at a site where a vector can be added.
        vectors: of the tokens, as the model has them there.
        tokens: of the run.
        seed: which latents, and the random directions.
    """
    generator, drawn = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    found: list[tuple[float, float, int]] = []
    for x, place in zip(vectors.x, vectors.place, strict=True):
        acts = autoencoder.encode(x[None].to(autoencoder.device))[0].cpu()
        active = np.flatnonzero(acts.numpy() > 0)
        if not len(active):
            continue
        chosen = torch.from_numpy(np.sort(generator.choice(active, min(EACH, len(active)), replace=False)))
        parts = acts[chosen, None] * autoencoder.decoder.float().cpu()[chosen]
        directions = torch.randn(parts.shape, generator=drawn)
        directions *= parts.norm(dim=-1, keepdim=True) / directions.norm(dim=-1, keepdim=True)
        changes = changes_of_logits(model, written_at(autoencoder), -torch.cat([parts, directions]), tokens, int(place))
        values = [sparsity_of(change) for change in changes]
        for own, other in zip(values[: len(parts)], values[len(parts) :], strict=True):
            if own is not None and other is not None:
                found.append((own, other, int(tokens.document[place])))
    columns = [np.array(column) for column in zip(*found, strict=True)] if found else [np.zeros(0)] * 3
    return Ablations(columns[0], columns[1], columns[2].astype(np.int64))


def changes_of_logits(
    model: LiveModel, site: Site, vectors: Float[torch.Tensor, "edit component"], tokens: RunTokens, place: int
) -> Float[torch.Tensor, "edit position vocabulary"]:
    """Logits with each vector added at one token, less those without, from that token on."""
    position = int(tokens.position[place])
    start = place - position
    end = min(place + AHEAD, start + int((tokens.sequence[start : place + AHEAD] == tokens.sequence[place]).sum()))
    ids = torch.from_numpy(tokens.token_id[start:end]).to(model.device)
    where: Any = edit_site(site)
    edits = [
        Intervention([Add(layer=site.layer, site=where, vector=v.tolist(), positions=f"{position}:{position + 1}")])
        for v in vectors
    ]
    with torch.no_grad(), model.edited([Intervention(), *edits]) as session:
        session.assign(range(len(edits) + 1))
        out = model.module(input_ids=ids.expand(len(edits) + 1, -1), use_cache=False)
        session.check_finite()
    logits = logits_in(out)[:, position:].float().cpu()
    return logits[1:] - logits[:1]


def sparsity_of(change: Float[torch.Tensor, "position vocabulary"]) -> float | None:
    """(L1 ÷ L2)² ÷ (V·T) of changes less their median at each position; None where nothing changes.

    1 over V·T where one logit changes at one position; 2/π (0.64) for independent normal changes everywhere.

    Example:
        >>> sparsity_of(torch.tensor([[0.0, 0.0, 3.0, 0.0]]))
        0.25
    """
    centred = (change - change.median(-1, keepdim=True).values).double()
    square = float(centred.square().sum())
    return float(centred.abs().sum()) ** 2 / square / centred.numel() if square > 0 else None


def ablation_rows(found: Ablations, *, seed: int) -> list[MeasureRow]:
    """Mean sparsity of latents and of random directions, with intervals over documents."""
    n = len(found.sparsity)
    if not n:
        return []
    values: Sequence[Any] = ByDocument(found.document, seed=seed).means(np.stack([found.sparsity, found.random], 1))
    return [
        MeasureRow("ablation_sparsity", condition, value[0], n, "share of logits", *value[1:])
        for condition, value in zip(("sae", "random_direction"), values, strict=True)
    ]
