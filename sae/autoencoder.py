"""`Autoencoder`: one sparse autoencoder of a store, or a published one, with the place in the model that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float

from moescope.core.errors import InputError
from moescope.core.sites import Site

# Ways of normalising in which every vector has a scale of its own, which decoding has to give back.
_BY_VECTOR = ("layer_norm", "constant_norm_rescale")


@dataclass(frozen=True, eq=False)
class Autoencoder:
    """A sparse autoencoder and where it belongs.

    Attributes:
        sae_id: its identity in the store; a fresh one where it is in none yet.
        name: the user's name for it.
        site: where the vectors it encodes are read.
        target_site: what it predicts, where that is another site (transcoders).
        expert: the one expert whose vectors it is of; None for all.
        module: SAELens' own object, on its device, in evaluation mode, its gradients off.
        row: its row of the table `saes`, by column.
        folder: where its weights lie.
    """

    sae_id: str
    name: str
    site: Site
    target_site: Site | None
    expert: int | None
    module: Any
    row: dict[str, Any]
    folder: Path | None = None

    def __repr__(self) -> str:
        kind = (self.row or {}).get("architecture") or type(self.module).__name__
        return f"Autoencoder({self.name!r}: {kind}, {self.d_in} → {self.d_sae:,} latents, at {self.site})"

    def _repr_html_(self) -> str:
        from moescope.sae.displays import autoencoder_html

        return autoencoder_html(self)

    @property
    def d_in(self) -> int:
        """Components of a vector."""
        return int(self.module.cfg.d_in)

    @property
    def d_out(self) -> int:
        """Components of what it reconstructs: `d_in`, but for transcoders between sites of different width."""
        return int(self.module.W_dec.shape[-1])

    @property
    def d_sae(self) -> int:
        """Latents."""
        return int(self.module.cfg.d_sae)

    @property
    def head(self) -> int | None:
        """The one head whose vectors it is of; None for all heads of the site side by side, or where there are none."""
        found = (self.row.get("settings") or {}).get("head")
        return None if found is None else int(found)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        found: torch.device = self.module.W_dec.device
        return found

    @property
    def decoder(self) -> Float[torch.Tensor, "latent component"]:
        """Decoder rows: what a unit of each latent adds to the reconstruction, in the units of the model's vectors.

        Where vectors are normalised one by one before they are encoded, in units of the normalised vector.
        """
        found: torch.Tensor = self.module.W_dec.detach()
        if getattr(self.module.cfg, "rescale_acts_by_decoder_norm", False):
            found = found / found.norm(dim=-1, keepdim=True)  # SAELens divides the activations when it decodes them
        return found

    @torch.no_grad()
    def encode(self, x: Float[torch.Tensor, "*row component"]) -> Float[torch.Tensor, "*row latent"]:
        """Activations of the latents, in float32. No host read."""
        acts: torch.Tensor = self.module.encode(x.to(self.module.dtype))
        return (acts.to_dense() if acts.is_sparse else acts).float()

    @torch.no_grad()
    def decode(
        self, activations: Float[torch.Tensor, "*row latent"], x: Float[torch.Tensor, "*row component"] | None = None
    ) -> Float[torch.Tensor, "*row component"]:
        """What activations stand for, in float32.

        Args:
            activations: of the latents.
            x: the input they come from. Skip transcoders and autoencoders that normalise each vector need it.

        Raises:
            InputError: `x` is needed and was not given.
        """
        skip = getattr(self.module, "W_skip", None)
        by_vector = self.module.cfg.normalize_activations in _BY_VECTOR
        if x is None and (skip is not None or by_vector):
            why = "adds a linear map of its input" if skip is not None else "gives each vector back its own scale"
            raise InputError(f"{self.name} {why} when it decodes", fix="pass the vectors it encoded: decode(acts, x)")
        if by_vector and x is not None:
            self.module.run_time_activation_norm_fn_in(x.to(self.module.dtype))  # it notes the scale of each vector
        found: torch.Tensor = self.module.decode(activations.to(self.module.dtype))
        if skip is not None and x is not None:
            found = found + x.to(self.module.dtype) @ skip.T
        return found.float()
