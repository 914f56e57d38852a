"""`Autoencoder`: one sparse autoencoder of a store, or a published one, with the place in the model that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float

from moescope.core.sites import Site


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

    @property
    def d_in(self) -> int:
        """Components of a vector."""
        return int(self.module.cfg.d_in)

    @property
    def d_sae(self) -> int:
        """Latents."""
        return int(self.module.cfg.d_sae)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.decoder.device

    @property
    def decoder(self) -> Float[torch.Tensor, "latent component"]:
        """Decoder rows: what a unit of each latent adds to the reconstruction, in the units of the model's vectors."""
        found: torch.Tensor = self.module.W_dec.detach()
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
        """What activations stand for, in float32; `x` is the input, which skip transcoders need."""
        del x
        found: torch.Tensor = self.module.decode(activations.to(self.module.dtype))
        return found.float()
