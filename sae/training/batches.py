"""Where training takes its batches from: anything that gives them one by one, and can say and find again where it is."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from jaxtyping import Float

from moescope.core.errors import InputError


class Batches(Protocol):
    """Batches of vectors without end, [row, component], float32, all of one size.

    A transcoder's batches hold both sides beside each other, [input, target].
    """

    def __next__(self) -> Float[torch.Tensor, "row component"]:
        """The next batch."""
        ...

    def state(self) -> dict[str, Any]:
        """Where it is, as plain data for JSON."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from where `state` was taken."""
        ...

    def close(self) -> None:
        """Let go of what is read ahead."""
        ...


class TensorBatches:
    """Batches of vectors that are in memory: every epoch in an order of its own, which the seed decides.

    Args:
        vectors: [row, component].
        batch_size: rows of a batch; what is left over at the end of an epoch waits for another.
        seed: of the orders.

    Raises:
        InputError: there are fewer vectors than a batch takes.

    Example:
        >>> batches = TensorBatches(torch.arange(6.0).reshape(6, 1), 3, seed=0)
        >>> sorted(torch.cat([next(batches), next(batches)]).flatten().tolist())
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """

    def __init__(self, vectors: Float[torch.Tensor, "row component"], batch_size: int, *, seed: int = 0) -> None:
        if len(vectors) < batch_size:
            raise InputError(
                f"a batch takes {batch_size:,} vectors", found=f"{len(vectors):,}", fix="use smaller batches"
            )
        self._vectors, self._size, self._seed = vectors, batch_size, seed
        self._epoch, self._next = 0, 0
        self._order = self._ordered()

    def _ordered(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed((self._seed << 20) + self._epoch)
        return torch.randperm(len(self._vectors), generator=generator)

    def __iter__(self) -> TensorBatches:
        return self

    def __next__(self) -> Float[torch.Tensor, "row component"]:
        """The next batch; a new epoch where too few are left."""
        if self._next + self._size > len(self._vectors):
            self._epoch, self._next = self._epoch + 1, 0
            self._order = self._ordered()
        rows = self._order[self._next : self._next + self._size]
        self._next += self._size
        return self._vectors[rows].float()

    def state(self) -> dict[str, Any]:
        """Epoch and place in it."""
        return {"epoch": self._epoch, "next": self._next}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from where `state` was taken."""
        self._epoch, self._next = int(state["epoch"]), int(state["next"])
        self._order = self._ordered()

    def close(self) -> None:
        """Nothing is read ahead."""
