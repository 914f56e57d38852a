"""Which latents of an autoencoder stand for those that edits name: others that are active about as often."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.core.edit import Edit
from moescope.core.edit_kinds.features import Descend, FeatureEdit, Latents
from moescope.probes.effects.latent_rates import Rates

_FAR = 2.0  # rates that differ by more are no match
_LEAST = 1e-6  # a share below which a latent counts as silent


class TooFewLatentsError(Exception):
    """An autoencoder has too few latents that are not named."""


class LatentDraws:
    """Draws other latents.

    Args:
        edits: of the intervention: no latent that any of them names stands for another.
        sources: the autoencoders, by name.
        rates: share of tokens on which each latent is active, by autoencoder.
        near: a latent is drawn among so many of nearest rate.
    """

    def __init__(self, edits: Sequence[Edit], sources: Mapping[str, Any], rates: Rates, *, near: int) -> None:
        self._sources, self._rates, self._near = sources, rates, near
        self._named: dict[str, set[int]] = {}
        for edit in edits:
            if isinstance(edit, (Latents, Descend)):
                self._named.setdefault(edit.sae, set()).update(edit.ids or ())
        self._norms: dict[str, NDArray[np.float64]] = {}
        self._unmatched, self._far = False, 1.0

    def stand_ins(self, sae: str, random: np.random.Generator) -> dict[int, int]:
        """Latent named → the one that stands for it."""
        named, rates = sorted(self._named[sae]), self._rates.get(sae)
        others = [i for i in range(self._count(sae)) if i not in self._named[sae]]
        if len(others) < len(named):
            raise TooFewLatentsError(f"of the {self._count(sae)} latents of {sae!r}, {len(named)} are named")
        if rates is None:
            self._unmatched = True
            return dict(zip(named, map(int, random.choice(others, len(named), replace=False)), strict=True))
        found: dict[int, int] = {}
        log = np.log(np.maximum(rates, _LEAST))
        for latent in map(int, random.permutation(named)):
            left = np.array([i for i in others if i not in set(found.values())])
            shuffled = random.permutation(left)  # those of equal distance in random order
            nearest = shuffled[np.argsort(np.abs(log[shuffled] - log[latent]), kind="stable")][: self._near]
            found[latent] = int(random.choice(nearest))
            self._far = max(self._far, float(np.exp(abs(log[found[latent]] - log[latent]))))
        return found

    def ratio(self, sae: str, latent: int, other: int) -> float:
        """Norm of one latent's decoder row over that of another; 1 where the other's is 0."""
        if sae not in self._norms:
            rows: torch.Tensor = self._sources[sae].decoder
            self._norms[sae] = rows.float().norm(dim=-1).double().cpu().numpy()
        norms = self._norms[sae]
        return float(norms[latent] / norms[other]) if norms[other] > 0 else 1.0

    def notes(self) -> list[str]:
        """What a reader must know of the draws."""
        if self._unmatched:
            return ["Control latents are drawn without matching how often they are active, which is not known."]
        if self._far > _FAR:
            return [
                f"A control latent is active up to {self._far:,.1f} times as often, or as rarely, as the one it stands for."
            ]
        return []

    def _count(self, sae: str) -> int:
        return len(self._sources[sae].decoder)


def matched_alike(edits: Sequence[Edit]) -> list[str]:
    """Autoencoders of edits whose controls are drawn by how often latents are active."""
    through = [e for e in edits if isinstance(e, FeatureEdit) and isinstance(e, (Latents, Descend)) and e.ids]
    return list(dict.fromkeys(edit.sae for edit in through))
