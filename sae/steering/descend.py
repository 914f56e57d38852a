"""Steering by descent in code space: towards the mean code of a class of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from moescope.core.edit_kinds.features import Descend
from moescope.core.intervention import Intervention
from moescope.sae.autoencoder import Autoencoder
from moescope.sae.steering.latent_edit import mean_codes
from moescope.sae.steering.steering import Steering, in_block
from moescope.sae.steering.text_vectors import At, label_vectors

if TYPE_CHECKING:
    from moescope.probes.live_model import LiveModel
    from moescope.store.run import Run


def descend_to(
    autoencoder: Autoencoder,
    model: LiveModel,
    texts: Sequence[str],
    *,
    steps: int = 10,
    rate: float = 0.05,
    keep: int | None = None,
    replace: bool = False,
    at: At = "last",
    name: str | None = None,
) -> Steering:
    """Move every token's code towards the mean code of a class of texts, step by step (arXiv 2502.18644).

    The autoencoder may read any site of the stream, or queries (`attn.hook_q`), as the authors do.

    Args:
        autoencoder: whose code.
        model: that it belongs to.
        texts: of the class.
        steps, rate, keep, replace: as `moescope.edits.Descend` takes them.
        at: where in a text its code is read.
        name: of the intervention.

    Raises:
        InputError: no texts, or numbers that `Descend` does not take.
    """
    codes = mean_codes(autoencoder, model, texts, at=at)
    told: dict[str, object] = {"texts": len(texts), "at": at}
    return _towards(autoencoder, codes.mean(0), steps, rate, keep, replace=replace, name=name, told=told)


def descend_to_label(
    autoencoder: Autoencoder,
    run: Run,
    label: str,
    *,
    steps: int = 10,
    rate: float = 0.05,
    keep: int | None = None,
    replace: bool = False,
    name: str | None = None,
) -> Steering:
    """The same with the documents of a label of a run, from its recorded vectors (each document's mean is encoded).

    Args:
        autoencoder, steps, rate, keep, replace, name: as for `descend_to`.
        run: with vectors at the autoencoder's site.
        label: of its documents.

    Raises:
        InputError: no such vectors or label.
    """
    vectors = torch.from_numpy(label_vectors(run, autoencoder.site, label)).to(autoencoder.device)
    code = autoencoder.encode(vectors).cpu().mean(0)
    told: dict[str, object] = {"run": run.name, "label": label, "texts": len(vectors)}
    return _towards(autoencoder, code, steps, rate, keep, replace=replace, name=name or f"towards {label}", told=told)


def _towards(
    autoencoder: Autoencoder,
    code: torch.Tensor,
    steps: int,
    rate: float,
    keep: int | None,
    *,
    replace: bool,
    name: str | None,
    told: dict[str, object],
) -> Steering:
    place = autoencoder.target_site or autoencoder.site
    edit = Descend(
        layer=place.layer,
        site=in_block(place),  # type: ignore[arg-type]  # checked with the edit
        sae=autoencoder.name,
        target=code.clamp(min=0).tolist(),
        steps=steps,
        rate=rate,
        keep=keep,
        replace=replace,
    )
    provenance = {"method": "descent to a mean code", "sae": autoencoder.name, "left": (1 - 2 * rate) ** steps, **told}
    return Steering(Intervention([edit], name=name or "towards a mean code"), provenance)
