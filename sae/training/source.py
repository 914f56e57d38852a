"""Where training's vectors come from: the shards that a run kept at a site, or two of them side by side."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from jaxtyping import Float

from moescope.core.sites import Site
from moescope.sae.training.batches import Batches
from moescope.store.run import Run


class Source(Protocol):
    """Vectors to train on, and some held out.

    A transcoder's vectors hold both sides beside each other, [input, target].

    Attributes:
        count: vectors to train on.
        held_out_count: vectors held out.
        notes: what was left out and why, one sentence each.
    """

    count: int
    held_out_count: int
    notes: list[str]

    @property
    def widths(self) -> tuple[int, int | None]:
        """Components of the input and, for a transcoder, of the target."""
        ...

    def sample(self, rows: int) -> Float[torch.Tensor, "row component"]:
        """Some of the vectors to train on, spread over them; all where there are fewer."""
        ...

    def held_out(self, rows: int) -> Float[torch.Tensor, "row component"]:
        """Some of the vectors held out; all where there are fewer, none where none are."""
        ...

    def batches(self, batch_size: int, seed: int) -> Batches:
        """Batches of the vectors to train on, shuffled, without end."""
        ...

    def facts(self) -> dict[str, Any]:
        """What decides which vectors these are, for the settings of what is trained."""
        ...


def source_of(
    run: Run,
    site: Site,
    *,
    target_site: Site | None,
    expert: int | None,
    head: int | None,
    held_out: float,
    max_norm_ratio: float | None,
    skip_first: int,
    verify: bool = True,
) -> Source:
    """The vectors that a run kept at a site, as training takes them.

    Args:
        run: whose vectors they are.
        site: where they were read.
        target_site: beside them, what transcoders predict.
        expert: the one expert whose vectors to take; None for all.
        head: the one head whose vectors to take; None for all heads side by side.
        held_out: share of the documents that training does not see.
        max_norm_ratio: leave out vectors of more than so many times the median norm; None keeps them.
        skip_first: leave out so many first tokens of each sequence.
        verify: check every shard against its checksum, which reads it whole.

    Raises:
        InputError: nothing was kept there, or it has no such expert or head.
        StoreError: a shard is missing or damaged.
        RunError: a vector that is not finite.
    """
    from moescope.sae.data.selection import Filter
    from moescope.sae.data.source import VectorSource

    asked = Filter(skip_first=skip_first, max_norm_ratio=max_norm_ratio, held_out=held_out)
    return VectorSource(run, site, target=target_site, expert=expert, head=head, asked=asked, verify=verify)
