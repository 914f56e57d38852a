"""The decisions that routers take while a context lasts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Int

from moescope.core.sites import EXPERT_INDICES, Site
from moescope.probes.live_model import LiveModel
from moescope.probes.taps import tapped
from moescope.sae.data.live import LivePass


class Decisions:
    """Ids given to the experts of each router in the last pass."""

    def __init__(self) -> None:
        self._held: dict[Site, torch.Tensor] = {}

    def receive(self, site: Site, tensors: dict[str, torch.Tensor]) -> None:
        """A tap's receiver."""
        self._held[site] = tensors["indices"].detach()

    def at(self, router: tuple[int, str], found: LivePass) -> Int[torch.Tensor, "token k"]:
        """Of the tokens that count in a pass, whose batch is padded at the right."""
        taken = self._held[Site(*router, EXPERT_INDICES)]
        return taken.index_select(0, places_of(found).to(taken.device)).long()


@contextmanager
def decisions_tapped(model: LiveModel, routers: Iterable[tuple[int, str]]) -> Iterator[Decisions]:
    """Keep the decisions of some routers, (layer, block), while the context lasts."""
    found = Decisions()
    sites = [Site(*at, EXPERT_INDICES) for at in routers]
    with tapped(model.module, model.anatomy, sites, found.receive):
        yield found


def places_of(found: LivePass) -> Int[torch.Tensor, " token"]:
    """Row · position places of the tokens that count, in a batch padded at the right."""
    return torch.from_numpy(found.row * int(found.batch.lengths.max()) + found.position)
