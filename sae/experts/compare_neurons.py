"""`compare_neurons`: a layer's neurons, the same neurons rotated, and an autoencoder, read on the same tokens at equal L0."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moescope.core.errors import InputError
from moescope.core.sites import MLP_OUT, RESID_POST
from moescope.probes.live_model import LiveModel
from moescope.sae.autoencoder import Autoencoder
from moescope.sae.data.live import site_vectors
from moescope.sae.data.run_batches import Documents
from moescope.sae.data.trained_with import TrainedWith
from moescope.sae.experts.neurons import ExpertNeurons, neurons_as_features, register_neurons
from moescope.sae.experts.run_text import run_text
from moescope.store.run import Run
from moescope.store.store import Store

_CALIBRATION = 2_000  # tokens


@dataclass(frozen=True)
class NeuronsRead:
    """What was read and stored.

    Attributes:
        neurons, rotated: the two sets of units beside the autoencoder.
        l0: active latents of the autoencoder on a token, which both were set to.
        widths: latents of the autoencoder, and of the layer.
    """

    neurons: ExpertNeurons
    rotated: ExpertNeurons
    l0: float
    widths: tuple[int, int]


def compare_neurons(
    autoencoder: Autoencoder,
    model: LiveModel,
    run: Run,
    store: Store,
    *,
    layer: int | None = None,
    documents: Documents = "held_out",
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> NeuronsRead:
    """Read a MoE layer's neurons as an autoencoder's latents are read, so that the two can be set side by side.

    The neurons of all experts are latents (`neurons_as_features`), and so are the same neurons along random axes of each expert,
    which write the same sum. A neuron is active where what it writes is at least a share of the length of what the
    routed experts write; the share is set, for either, so that as many are active on a token as latents of the autoencoder:
    rarer units have higher lifts, and only at equal L0 does that say something. All three go through
    `moescope.sae.reading.read.read_features` on the same documents; the analysis `neurons_against_sae` tells what came of it.

    Args:
        autoencoder: of the layer's output, or of the stream behind it; best of about the layer's width.
        model: the model it belongs to.
        run: whose sequences are run again.
        store: open for writing.
        layer: of the neurons; None for the autoencoder's own.
        documents: `held_out`: without those the autoencoder was trained on, where it was trained on this run.
        batch_size: sequences a forward pass of the calibration.
        seed: of the rotation and the reading.
        progress: show how far it is, on stderr.

    Raises:
        InputError: no experts in that layer, neurons that cannot be read, or an autoencoder of another place.

    Example:
        >>> import moescope as ms
        >>> from moescope.sae.loading import load_autoencoder
        >>> def compared(store: ms.Store) -> NeuronsRead:
        ...     return compare_neurons(load_autoencoder(store, "mine"), ms.load("demo"), store.run("base"), store)
    """
    from moescope.sae.reading.read import read_features

    if store.read_only:
        raise InputError(f"{store.path} is open for reading only", fix="open it with Store(path)")
    site = autoencoder.target_site or autoencoder.site
    if autoencoder.expert is not None or site.tensor not in (MLP_OUT, RESID_POST):
        raise InputError(
            f"{autoencoder.name!r} is of {site}",
            expected="an autoencoder of a MoE block's output, or of the stream behind it",
            fix="take another one",
        )
    at = site.layer if layer is None else layer
    plain = neurons_as_features(model, at)
    turned = neurons_as_features(model, at, rotation=seed)
    l0, shares = _calibrated(autoencoder, [plain, turned], model, run, documents, batch_size)
    units = [
        neurons_as_features(model, at, least=share, rotation=u.rotation)
        for share, u in zip(shares, (plain, turned), strict=True)
    ]
    told = autoencoder.row
    kept = {
        k: v for k, v in (told.get("settings") or {}).items() if k in ("held_out_share", "split_seed", "skip_first")
    }
    for number, unit in enumerate(units):
        row = {**unit.row, "trained_on": told.get("trained_on"), "settings": {**unit.row["settings"], **kept}}
        units[number] = replace(unit, row=row)
        register_neurons(store, units[number])
    for one in (autoencoder, *units):
        read_features(one, run, store, model=model, documents=documents, progress=progress, seed=seed)  # type: ignore[arg-type]  # units have its attributes
    return NeuronsRead(units[0], units[1], l0, (autoencoder.d_sae, plain.d_sae))


@torch.no_grad()
def _calibrated(
    autoencoder: Autoencoder,
    units: list[ExpertNeurons],
    model: LiveModel,
    run: Run,
    documents: Documents,
    batch_size: int,
) -> tuple[float, list[float]]:
    """Active latents a token, and for each set of units the share of the output's length at which as many are active."""
    text = run_text(run, autoencoder, documents=documents, tokens=_CALIBRATION)
    active = rows = 0
    sizes: list[list[torch.Tensor]] = [[] for _ in units]
    sites = list(dict.fromkeys([autoencoder.site, units[0].site]))
    for batch in text.batches(batch_size):
        found = site_vectors(model, batch, sites, first=TrainedWith.of(autoencoder.row).skip_first)
        if not len(found):
            continue
        acts = autoencoder.encode(found[autoencoder.site].vectors.to(autoencoder.device).float())
        active, rows = active + int((acts > 0).sum()), rows + len(acts)
        for unit, held in zip(units, sizes, strict=True):
            written = unit.encode(found[unit.site].vectors.float())
            whole = (written @ unit.decoder).norm(dim=-1, keepdim=True).clamp(min=1e-12)
            share = (written * unit.lengths / whole).flatten()
            held.append(share[share > 1e-4].cpu())  # what is less will not be among the largest
    if not active:
        raise InputError(
            f"no latent of {autoencoder.name!r} is active on {rows:,} tokens",
            fix="take another autoencoder, or more text",
        )
    return active / rows, [_at_count(torch.cat(held), active) for held in sizes]


def _at_count(shares: torch.Tensor, count: int) -> float:
    """The share that so many reach."""
    return min(0.999, float(shares.topk(min(count, len(shares))).values[-1])) if len(shares) else 0.0
