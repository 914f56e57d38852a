"""What steps through a sparse autoencoder share: the autoencoder, the code of what passes, and what a place must have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from jaxtyping import Float

from moescope.core.edit_kinds.features import FeatureEdit
from moescope.core.sites import EXPERT_OUT, Site
from moescope.probes.edits.now import Now
from moescope.probes.edits.step import Place
from moescope.probes.edits.steps.stream import SiteStep, width_at

F = TypeVar("F", bound=FeatureEdit)

SLOTS = f"mlp.{EXPERT_OUT}"
Code = Float[torch.Tensor, "row position latent"]


class Encoder(Protocol):
    """A sparse autoencoder, as far as edits need it; `moescope.sae` has them.

    Attributes:
        site: where the vectors it encodes are read.
    """

    site: Site

    @property
    def d_in(self) -> int:
        """Components of a vector it encodes."""

    @property
    def decoder(self) -> torch.Tensor:
        """[latent, component] what a unit of each latent adds to the reconstruction."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Activations of the latents, in float32."""

    def decode(self, activations: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        """What activations stand for; `x`, the input, is given to a transcoder only."""


class FeatureStep(SiteStep[F]):
    """A step through an autoencoder.

    Attributes:
        autoencoder: which.
        reads: site of the same block whose vectors it encodes, where that is another one (a transcoder); None for its own.
    """

    def __init__(self, edits: Sequence[F | None], place: Place) -> None:
        edit = next(edit for edit in edits if edit is not None)
        self.autoencoder: Encoder = place.sources[edit.sae]
        self.reads = reads_of(self.autoencoder)
        self._seen: tuple[Code, torch.Tensor] | None = None
        self._given: torch.Tensor | None = None
        settings = getattr(getattr(self.autoencoder, "module", None), "cfg", None)
        # Each vector is brought to one length before it is encoded; decoder rows are then in units of that.
        self.own_scale = getattr(settings, "normalize_activations", None) in ("layer_norm", "constant_norm_rescale")
        super().__init__(edits, place)

    @staticmethod
    def form(edit: Any) -> Any:
        """The site and the autoencoder."""
        return edit.site, edit.sae

    @classmethod
    def why_not(cls, edit: Any, place: Place) -> str | None:
        """Why an edit cannot be made in a place; None where it can."""
        if reason := autoencoder_fault(edit, place):
            return reason
        return why_not_here(place.sources[edit.sae], edit, place) or super().why_not(edit, place)

    def see(self, vectors: torch.Tensor) -> None:
        """Encode what a transcoder reads, before its target comes by."""
        self._seen = self.autoencoder.encode(vectors.to(self.autoencoder.decoder.device)), vectors

    def code(self, given: torch.Tensor) -> Code:
        """Activations for what passes (or has passed where a transcoder reads), in float32."""
        if self._seen is not None:
            return self._seen[0]
        self._given = given.to(self.autoencoder.decoder.device)
        return self.autoencoder.encode(self._given)

    def decoded(self, code: Code) -> torch.Tensor:
        """What a code stands for, for the vectors that were encoded last."""
        if self._seen is not None:
            return self.autoencoder.decode(code, self._seen[1].to(code.device))
        return self.autoencoder.decode(code, self._given) if self.own_scale else self.autoencoder.decode(code)


def autoencoder_fault(edit: FeatureEdit, place: Place) -> str | None:
    """Why there is no autoencoder for an edit; None where there is one."""
    found = place.sources.get(edit.sae)
    if found is None:
        given = ", ".join(map(repr, place.sources)) or "none"
        return (
            f"the autoencoder {edit.sae!r} is not among the given ones ({given}); "
            f"pass sources={{{edit.sae!r}: autoencoder}}"
        )
    if not all(hasattr(found, name) for name in ("encode", "decode", "decoder", "d_in")):
        return f"the source {edit.sae!r} is a {type(found).__name__}, and no autoencoder"
    return None


class Watching:
    """Lets a step see what passes another site of its block, and changes nothing there."""

    def __init__(self, step: FeatureStep[Any]) -> None:
        self.step = step

    def change(self, given: torch.Tensor, now: Now) -> torch.Tensor:
        """The same vectors."""
        self.step.see(given)
        return given


def reads_of(autoencoder: Any) -> str | None:
    """Site in the block whose vectors a transcoder encodes; None for an autoencoder, which encodes what it stands for."""
    target = getattr(autoencoder, "target_site", None)
    return None if target is None or str(target) == str(autoencoder.site) else _in_block(autoencoder.site)


def why_not_here(autoencoder: Any, edit: FeatureEdit, place: Place) -> str | None:
    """What keeps an autoencoder from a place; None for nothing."""
    digest = (getattr(autoencoder, "row", None) or {}).get("anatomy_digest")
    if digest is not None and digest != place.anatomy.digest and not edit.forced:
        return "it belongs to another model (of another anatomy); forced=True uses it all the same"
    return _why_no_part(autoencoder, edit) or _why_no_site(autoencoder, edit, place)


def _why_no_part(autoencoder: Any, edit: FeatureEdit) -> str | None:
    """What an autoencoder of a part of a site's vectors is not for."""
    if getattr(autoencoder, "head", None) is not None:
        return f"it reads head {autoencoder.head} alone"
    if getattr(autoencoder, "expert", None) is not None and edit.site != SLOTS:
        return f"it reads outputs of expert {autoencoder.expert} alone"
    return None


def _why_no_site(autoencoder: Any, edit: FeatureEdit, place: Place) -> str | None:
    source = autoencoder.site
    stands_for = getattr(autoencoder, "target_site", None) or source
    reads = reads_of(autoencoder)
    here = Site(place.layer, "", edit.site)
    if reads is not None and source.layer != stands_for.layer:
        return f"it reads {source} and predicts {stands_for}, another block's"
    if str(stands_for) != str(here) and not edit.forced:
        where = f"layer={stands_for.layer}, site={_in_block(stands_for)!r}"
        return f"its vectors are those of {stands_for}, not of {here}: use {where}, or forced=True to use it here all the same"
    for site, width in ((reads or edit.site, int(autoencoder.d_in)), (edit.site, int(autoencoder.decoder.shape[-1]))):
        there = width_at(site, place)
        if there is not None and there != width:
            return f"its vectors have {width:,} numbers, those at {Site(place.layer, '', site)} {there:,}"
    return None


def latents_fault(ids: Sequence[int] | None, autoencoder: Any) -> str | None:
    """What is wrong with numbers of latents; None for nothing."""
    n = len(autoencoder.decoder)
    wrong = [i for i in ids or () if not 0 <= i < n]
    return f"it has latents 0 to {n - 1:,}, no latent {wrong[0]:,}" if wrong else None


def _in_block(site: Site) -> str:
    return f"{site.block}.{site.tensor}" if site.block else site.tensor
