"""Whether an autoencoder belongs to a model: by its weights' digest, its anatomy, its name; and whether its width fits."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from moescope.core.errors import InputError
from moescope.core.sites import (
    ATTN_OUT,
    DENSE_POST,
    EXPERT_OUT,
    EXPERT_POST,
    MLP_OUT,
    RESID_POST,
    RESID_PRE,
    SHARED_OUT,
    Site,
)

if TYPE_CHECKING:
    from moescope.probes.live_model import LiveModel
    from moescope.sae.autoencoder import Autoencoder

_OF_THE_STREAM = (RESID_PRE, RESID_POST, ATTN_OUT, MLP_OUT, EXPERT_OUT, SHARED_OUT, "hook_in")
_NEURONS = (DENSE_POST, EXPERT_POST)
# What of a model's anatomy the store keeps and two models of one make have in common.
_MAKE = ("architecture", "d_model", "vocabulary", "n_layers")


def check_belongs(autoencoder: Autoencoder, model: LiveModel, *, force: bool = False) -> None:
    """Refuse an autoencoder that is not this model's.

    Weights are compared where both sides have a digest of files; else the make of the model (architecture, width, vocabulary,
    blocks, its experts), then its name.

    Args:
        autoencoder: loaded.
        model: that it shall be used with.
        force: leave out the comparison of models. Site and width are compared all the same.

    Raises:
        InputError: it belongs to another model, both named; or its site or width is not this model's.
    """
    if not force and (why := _other_model(autoencoder.row, model)):
        raise InputError(
            f"the autoencoder {autoencoder.name!r} belongs to another model: {why}",
            expected=f"one of {model.name}",
            found=f"one of {autoencoder.row.get('model') or 'a model it does not name'}",
            fix="load the model it belongs to, or pass force=True (--force) to use it all the same",
        )
    _check_width(autoencoder.name, autoencoder.site, autoencoder.d_in, model, autoencoder.head)
    if autoencoder.target_site is not None:
        _check_width(autoencoder.name, autoencoder.target_site, autoencoder.d_out, model, None)


def _other_model(row: dict[str, Any], model: LiveModel) -> str | None:
    """What tells the autoencoder's model from this one; None where nothing does."""
    settings = row.get("settings") or {}
    theirs, ours = settings.get("revision"), model.revision
    if theirs and ours and theirs == ours:
        return None
    digest = row.get("anatomy_digest")
    if digest and digest != model.anatomy.digest:
        return f"the anatomy of its model has digest {digest}, this one {model.anatomy.digest}"
    facts, found = settings.get("anatomy") or {}, model.anatomy.facts()
    for key in _MAKE:
        if key in facts and facts[key] != found[key]:
            return f"its model has {key} {facts[key]}, this one {found[key]}"
    by_contents = "sha256-sampled:"
    if all(isinstance(r, str) and r.startswith(by_contents) for r in (theirs, ours)):
        return f"weights with digest {theirs}, here {ours}"
    named = row.get("model")
    if not named or same_name(str(named), model.name):
        return None
    return f"{named}, not {model.name}"


def same_name(one: str, other: str) -> bool:
    """Whether two names mean one model: equal, equal after the organisation, or known as one to TransformerLens.

    Example:
        >>> same_name("google/gemma-2-2b", "gemma-2-2b")
        True
        >>> same_name("EleutherAI/pythia-70m", "EleutherAI/pythia-160m")
        False
    """
    plain = [name.rstrip("/").rpartition("/")[2].lower().removesuffix(".gguf") for name in (one, other)]
    return plain[0] == plain[1] or _official(one) == _official(other)


def _official(name: str) -> str:
    """The Hub's name for what TransformerLens calls `name`; the name itself where it knows none."""
    from transformer_lens.loading_from_pretrained import get_official_model_name

    with suppress(ValueError):
        return str(get_official_model_name(name))
    return name


def _check_width(name: str, site: Site, width: int, model: LiveModel, head: int | None) -> None:
    anatomy = model.anatomy
    if site.layer >= anatomy.n_layers:
        raise InputError(
            f"{name!r} is of {site}, and this model has {anatomy.n_layers} blocks",
            fix="load the model it belongs to",
        )
    expected = _width(site, model, head)
    if expected is not None and expected != width:
        raise InputError(
            f"the width of {name!r} is not that of {site} in {model.name}",
            expected=f"{expected:,} components",
            found=f"{width:,}",
            fix="load the model it belongs to; the width cannot be forced",
        )


def _width(site: Site, model: LiveModel, head: int | None) -> int | None:
    """Components of a vector at a site; None where only a forward pass would tell."""
    if site.tensor in _OF_THE_STREAM and head is None:
        return model.anatomy.d_model
    if site.tensor in _NEURONS:
        inside = (s for s in model.anatomy.sublayers if (s.layer, s.block) == (site.layer, site.block))
        return next((s.d_expert for s in inside), None)
    return None
