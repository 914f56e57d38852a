"""What a unit of each latent adds to the logits on the direct path: decoder row · final norm · unembedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.core.sites import ATTN_OUT, EXPERT_OUT, MLP_OUT, RESID_POST, RESID_PRE, SHARED_OUT
from moescope.sae.autoencoder import Autoencoder
from moescope.sae.reading.run_text import RunText

if TYPE_CHECKING:
    from moescope.probes.live_model import LiveModel

IN_STREAM = (RESID_PRE, "hook_resid_mid", RESID_POST, ATTN_OUT, MLP_OUT, EXPERT_OUT, SHARED_OUT)
_TEXTS, _LENGTH = 8, 128  # of the run, for the mean scale of the final norm
_TARGETS = 16_384  # token ids asked at once: their directions are [target, d_model] in float64


@dataclass(frozen=True)
class LogitEffects:
    """Token ids whose logits each latent moves most, by a unit of activation, less the mean over the vocabulary.

    Attributes:
        raised_ids, lowered_ids: [latent, rank].
        raised, lowered: [latent, rank] logits.
        vocabulary: how many ids there are.
        notes: what a reader must know.
    """

    raised_ids: NDArray[np.int32]
    raised: NDArray[np.float32]
    lowered_ids: NDArray[np.int32]
    lowered: NDArray[np.float32]
    vocabulary: int
    notes: tuple[str, ...]


def why_no_logits(autoencoder: Autoencoder, model: LiveModel | None) -> str | None:
    """Why nothing can be said of logits; None where something can."""
    site = autoencoder.target_site or autoencoder.site
    if site.tensor not in IN_STREAM:
        return f"what it reconstructs, {site}, is not added to the residual stream as it stands"
    if model is None:
        return "the model was not given"
    return model.anatomy.no_stream


@torch.no_grad()
def logit_effects(autoencoder: Autoencoder, model: LiveModel, text: RunText, *, top: int) -> LogitEffects:
    """What a unit of activation adds to each logit past all later layers (direct logit attribution, Elhage et al. 2021).

    effect = s̄ · (decoder row ∘ gain) · W_U − its mean over the vocabulary, where gain is the final norm's and s̄ the mean over
    tokens of the run of its scale, 1 ÷ root mean square (or standard deviation) of the stream; LayerNorm's subtraction of the
    mean is in it. What attention and later MLPs make of the direction is not.

    Args:
        autoencoder: of a site in the residual stream's width.
        model: it belongs to.
        text: tokens of the run; the first 128 of up to eight sequences give the scale.
        top: ids kept at either end.

    Raises:
        InputError: logits of this model are no linear reading of its normed stream.
    """
    from moescope.probes.attribution.logit_readout import readout
    from moescope.probes.forward import DeviceBatch

    batches = []
    starts = text.starts(text.sequence_id)
    for number in np.unique(np.linspace(0, len(starts) - 2, _TEXTS).astype(int)):
        ids = torch.from_numpy(text.token_id[starts[number] : starts[number + 1]][:_LENGTH].astype(np.int64))[None]
        batches.append(DeviceBatch(ids.to(model.device), torch.ones_like(ids, dtype=torch.bool).to(model.device)))
    scales = []
    for batch in batches:
        read = readout(model, batch, targets=[0], positions="all", versus=None)
        scales.append(read.directions[:, 0].norm(dim=-1))
    # Directions at two positions differ by the scale alone, so one norm stands for it. First tokens are left out: their stream
    # can be a thousand times as long.
    reference = scales[0][-1]
    scale = torch.cat([s[1:] if len(s) > 1 else s for s in scales]).mean() / reference
    decoder = autoencoder.decoder.float()
    best: tuple[torch.Tensor, torch.Tensor] | None = None
    vocabulary = model.anatomy.vocabulary
    for start in range(0, vocabulary, _TARGETS):
        targets = list(range(start, min(start + _TARGETS, vocabulary)))
        read = readout(model, batches[0], targets=targets, positions="last", versus=None)
        directions = read.directions[0] * scale
        relative = (directions[:-1] - directions[-1]).float().to(decoder.device)
        best = _kept(best, decoder, relative, start, top)
    assert best is not None
    notes = [
        "Logit effects are those of the direct path to the unembedding, through the final norm's gain at its mean scale."
    ]
    if (autoencoder.target_site or autoencoder.site).tensor == EXPERT_OUT:
        notes.append("They are of an expert's output before its routing weight.")
    if read.cap is not None:
        notes.append(read.cap + ".")
    effects, token_ids = best[0].cpu().numpy(), best[1].cpu().numpy().astype(np.int32)
    return LogitEffects(
        token_ids[:, :top], effects[:, :top], token_ids[:, top:][:, ::-1], effects[:, top:][:, ::-1], vocabulary, tuple(notes)
    )  # fmt: skip


def _kept(
    best: tuple[torch.Tensor, torch.Tensor] | None,
    decoder: Float[torch.Tensor, "latent d_model"],
    directions: Float[torch.Tensor, "target d_model"],
    first: int,
    top: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[latent, 2 · top] the largest and then the smallest effects so far, each falling, and their token ids."""
    parts = []
    for start in range(0, len(decoder), 1024):
        effects = decoder[start : start + 1024] @ directions.T
        ids = torch.arange(first, first + effects.shape[1], device=effects.device).expand(effects.shape)
        if best is not None:
            effects = torch.cat([best[0][start : start + 1024], effects], 1)
            ids = torch.cat([best[1][start : start + 1024], ids], 1)
        up, down = effects.topk(top, 1), effects.topk(top, 1, largest=False)
        values = torch.cat([up.values, down.values.flip(1)], 1)
        parts.append((values, torch.cat([ids.gather(1, up.indices), ids.gather(1, down.indices.flip(1))], 1)))
    return torch.cat([v for v, _ in parts]), torch.cat([i for _, i in parts])


def checked_top(top: int, vocabulary: int) -> int:
    """How many ids to keep at either end, so that none stands at both.

    Raises:
        InputError: fewer than one.
    """
    if top < 1:
        raise InputError("logits must be at least 1", found=str(top))
    return min(top, vocabulary // 2)
