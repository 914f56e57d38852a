"""Planted autoencoders: plain torch, with weights that a test sets."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch


class PlantedModule:
    """Latents ReLU(x · W_enc − threshold), decoded by W_dec; what `Autoencoder` asks of SAELens' object."""

    def __init__(self, encoder: torch.Tensor, decoder: torch.Tensor, threshold: torch.Tensor) -> None:
        self.W_enc, self.W_dec, self.threshold = encoder, decoder, threshold
        self.cfg = SimpleNamespace(d_in=encoder.shape[0], d_sae=encoder.shape[1])
        self.dtype = torch.float32

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.W_enc - self.threshold)

    def decode(self, activations: torch.Tensor) -> torch.Tensor:
        return activations @ self.W_dec


@pytest.fixture
def planted_autoencoder(store: Any) -> Callable[..., Any]:
    """`planted_autoencoder(site, decoder, encoder=None, threshold=0.0, …)`: an autoencoder whose row is in the store."""
    from moescope.core.sites import Site
    from moescope.sae.autoencoder import Autoencoder
    from moescope.store.sae_rows import write_rows

    def build(
        site: str,
        decoder: torch.Tensor,
        *,
        encoder: torch.Tensor | None = None,
        threshold: float | torch.Tensor = 0.0,
        name: str = "planted",
        trained_on: str | None = None,
        settings: dict[str, Any] | None = None,
        expert: int | None = None,
        target: str | None = None,
    ) -> Any:
        given = decoder.T.clone() if encoder is None else encoder
        module = PlantedModule(given, decoder, torch.as_tensor(threshold))
        sae_id = str(uuid.uuid4())
        row = {"sae_id": sae_id, "name": name, "site": site, "d_in": len(given), "d_sae": len(decoder)}
        write_rows(store, {"saes": [row]})
        return Autoencoder(
            sae_id=sae_id,
            name=name,
            site=Site.parse(site),
            target_site=None if target is None else Site.parse(target),
            expert=expert,
            module=module,
            row={**row, "trained_on": trained_on, "settings": settings or {}},
        )

    return build
