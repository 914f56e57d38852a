"""Edits of chosen latents: by a value, by what they reach in the corpus, or by the contrast of two sets of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from moescope.core.edit_kinds.features import Latents
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.sae.autoencoder import Autoencoder
from moescope.sae.steering.steering import Steering, in_block
from moescope.sae.steering.text_vectors import At, text_vectors

if TYPE_CHECKING:
    from moescope.probes.live_model import LiveModel
    from moescope.store.store import Store

_READ = """
    SELECT feature, max(maximum) AS maximum, sum(mean * active) / nullif(sum(active), 0) AS mean
    FROM features
    WHERE sae_id = ? AND feature IN (SELECT unnest(?::INTEGER[]))
    GROUP BY feature
    ORDER BY feature
"""


def latent_edit(
    autoencoder: Autoencoder,
    features: Sequence[int] | int,
    *,
    how: Literal["add", "set", "scale"] = "add",
    value: float | Sequence[float] | Literal["max", "mean"] = "max",
    multiple: float = 1.0,
    only_active: bool = False,
    store: Store | None = None,
    name: str | None = None,
) -> Steering:
    """An edit of some latents at the autoencoder's own site.

    Args:
        autoencoder: whose.
        features: which latents, by their numbers.
        how: as `moescope.edits.Latents` does it; `set` is x′ = x + (v − z) d (arXiv 2408.00657).
        value: in units of activation, one or one a latent; `max` or `mean`, what the latent reaches, or is where it is active,
            over the corpus that its table of features was read from.
        multiple: of the value.
        only_active: only where the latent is active.
        store: with the table `features`, for `max` and `mean`.
        name: of the intervention.

    Raises:
        InputError: no such latent, or features that were not read.
    """
    ids = [features] if isinstance(features, int) else [int(i) for i in features]
    if wrong := [i for i in ids if not 0 <= i < autoencoder.d_sae]:
        raise InputError(
            f"autoencoder {autoencoder.name!r} has no latent {wrong[0]}", expected=f"0 to {autoencoder.d_sae - 1}"
        )
    if isinstance(value, str):
        given = _reached(autoencoder, ids, value, store)
    else:
        given = [float(value)] * len(ids) if isinstance(value, (int, float)) else [float(v) for v in value]
    values = [v * multiple for v in given]
    edit = _at_its_site(autoencoder, ids, values, how, only_active=only_active)
    told = {"method": f"latents, {how}", "sae": autoencoder.name, "latents": ids, "values": values}
    told["value"] = value if isinstance(value, str) else "given"
    return Steering(Intervention([edit], name=name or _called(ids)), told)


def feature_set(
    autoencoder: Autoencoder,
    model: LiveModel,
    wanted: Sequence[str],
    unwanted: Sequence[str],
    *,
    top: int = 16,
    at: At = "last",
    only_active: bool = True,
    name: str | None = None,
) -> Steering:
    """Latents that two sets of texts differ in most, moved by their mean difference where they are active (LF-Steering).

    For paraphrases: `wanted` are those that the model answers alike, `unwanted` those that it answers otherwise. Latents are
    ranked by the difference of their mean activations in units of its standard error, so that none stands first for being
    large; h′ = h + α · Σ b d over those active on a token, b the difference of means, α the strength (arXiv 2501.11036).

    Args:
        autoencoder: whose latents, at a site of the stream, of a sublayer or of heads.
        model: that it belongs to.
        wanted, unwanted: texts, each counted once.
        top: how many latents.
        at: where in a text they are read.
        only_active: as the method has it; False moves them at every token.
        name: of the intervention.

    Raises:
        InputError: fewer than two texts a side, or latents that do not differ.
    """
    if min(len(wanted), len(unwanted)) < 2 or top < 1:
        raise InputError("a contrast needs two texts a side, and at least one latent", found=f"top={top}")
    codes = [mean_codes(autoencoder, model, texts, at=at) for texts in (wanted, unwanted)]
    difference = codes[0].mean(0) - codes[1].mean(0)
    error = torch.stack([code.var(0) / len(code) for code in codes]).sum(0).sqrt()
    score = torch.where(difference == 0, 0.0, difference.abs() / (error + 1e-6 + 0.01 * difference.abs()))
    ids = [int(i) for i in score.argsort(descending=True, stable=True)[:top] if float(score[i]) > 0]
    if not ids:
        raise InputError("no latent differs between the two sides", fix="give other texts, or read another site")
    edit = _at_its_site(autoencoder, ids, difference[ids].tolist(), "add", only_active=only_active)
    told = {
        "method": "feature set by contrast",
        "sae": autoencoder.name,
        "latents": ids,
        "scores": score[ids].tolist(),
        "wanted_texts": len(wanted),
        "unwanted_texts": len(unwanted),
        "at": at,
    }
    return Steering(Intervention([edit], name=name or f"{len(ids)} latents by contrast"), told)


def mean_codes(autoencoder: Autoencoder, model: LiveModel, texts: Sequence[str], *, at: At = "last") -> torch.Tensor:
    """[text, latent] code of each text: of its last token, or of the mean of its vectors."""
    if getattr(autoencoder, "head", None) is not None or autoencoder.expert is not None:
        raise InputError(
            f"{autoencoder.name!r} reads one head or expert alone, and nothing can be steered through it",
            fix="take an autoencoder of the stream, of a sublayer's output, or of all heads",
        )
    vectors = text_vectors(model, texts, [autoencoder.site], at=at)[autoencoder.site]
    return autoencoder.encode(vectors.to(autoencoder.device)).cpu()


def _at_its_site(
    autoencoder: Autoencoder,
    ids: Sequence[int],
    values: Sequence[float],
    how: Literal["add", "set", "scale"],
    *,
    only_active: bool,
) -> Latents:
    place = autoencoder.target_site or autoencoder.site
    return Latents(
        layer=place.layer,
        site=in_block(place),  # type: ignore[arg-type]  # checked with the edit
        sae=autoencoder.name,
        latents=list(ids),
        how=how,
        values=list(values),
        only_active=only_active,
    )


def _called(ids: Sequence[int]) -> str:
    """`latent 3`, `latents 3, 7`, `5 latents`."""
    if len(ids) > 4:
        return f"{len(ids)} latents"
    return f"latent{'s' if len(ids) > 1 else ''} {', '.join(map(str, ids))}"


def _reached(autoencoder: Autoencoder, ids: Sequence[int], which: str, store: Store | None) -> list[float]:
    """What latents reach, or are where active, from the table `features`."""
    if which not in ("max", "mean"):
        raise InputError(f"a value cannot be {which!r}", expected="a number, 'max' or 'mean'")
    rows = [] if store is None else store.fetch(_READ, [autoencoder.sae_id, list(ids)])
    found = {int(feature): (maximum, mean) for feature, maximum, mean in rows}
    missing = [i for i in ids if i not in found or found[i][which == "mean"] is None]
    if missing:
        raise InputError(
            f"what latent {missing[0]} of {autoencoder.name!r} reaches is not known",
            expected="its row in the table `features`, with activations over 0",
            fix="read the features first (moescope sae read), or give a value in units of activation",
        )
    return [float(np.float64(found[i][which == "mean"])) for i in ids]
