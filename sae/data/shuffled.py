"""Recorded vectors in an order of their own every epoch: batches without end, within a bounded memory, resumed to the bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.sae.data.site_rows import Rows

Gather = Callable[[Rows], NDArray[np.float32]]
# Rows that lie beside each other and are read together: short enough that many texts are mixed, long enough to read well.
_LONGEST_SEGMENT, _SHORTEST_SEGMENT, _MIXED_SEGMENTS = 256, 8, 256


class ShuffledBatches:
    """An infinite iterator over batches of rows, every row once an epoch.

    Rows are cut into segments that lie together in their files, of at most 256 rows, fewer where vectors are wide. Each epoch
    takes the segments in a random order, some at a time, as many as half the buffer holds, and mixes their rows; while those are
    given out, a thread reads the next. Epochs follow each other without a gap: a batch may hold the last rows of one and the
    first of the next.

    Where it is, is one number: how many rows it has given. All orders follow from that and the seed.

    Args:
        rows: their numbers, ascending.
        gather: gives the vectors of rows, [row, width].
        width: components of a vector.
        batch_size: rows of a batch.
        seed: of the orders.
        device: where batches go.
        buffer_bytes: memory for rows that are read ahead and mixed.

    Raises:
        InputError: there are fewer rows than a batch takes, or than one.
        RunError: when a batch is read: a vector that is not finite.

    Example:
        >>> batches = ShuffledBatches(np.arange(6), lambda rows: rows[:, None].astype(np.float32), 1, 4, seed=0)
        >>> drawn = torch.cat([next(batches) for _ in range(3)]).flatten().tolist()
        >>> sorted(drawn[:6]) == sorted(drawn[6:]) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
        True
    """

    def __init__(
        self,
        rows: Rows,
        gather: Gather,
        width: int,
        batch_size: int,
        *,
        seed: int = 0,
        device: str | torch.device = "cpu",
        buffer_bytes: int = 128 << 20,
    ) -> None:
        if not 1 <= batch_size <= len(rows):
            raise InputError(
                f"a batch takes {batch_size:,} vectors",
                found=f"there are {len(rows):,}",
                fix="use smaller batches (batch_size), or record more text or a larger share of its tokens",
            )
        self._rows, self._gather, self._size, self._seed = rows, gather, batch_size, seed % 2**63
        self._device = torch.device(device)
        half = max(1, buffer_bytes // 2 // (width * 4))
        self._segment = min(_LONGEST_SEGMENT, max(_SHORTEST_SEGMENT, half // _MIXED_SEGMENTS))
        self._segments = -(-len(rows) // self._segment)
        self._group = max(1, half // self._segment)  # segments that are mixed
        self._given = 0
        self._order: tuple[int, Rows, Rows] | None = None  # epoch, its segments in order, rows before each group
        self._held: tuple[tuple[int, int], torch.Tensor] | None = None
        self._ahead: tuple[tuple[int, int], Future[torch.Tensor]] | None = None
        self._reader: ThreadPoolExecutor | None = None

    def __iter__(self) -> ShuffledBatches:
        return self

    def __next__(self) -> Float[torch.Tensor, "row component"]:
        """The next batch, float32, on the device."""
        parts: list[torch.Tensor] = []
        wanted = self._size
        while wanted:
            epoch, within = divmod(self._given, len(self._rows))
            starts = self._ordered(epoch)[1]
            group = int(np.searchsorted(starts, within, side="right")) - 1
            mixed, offset = self._mixed(epoch, group), within - int(starts[group])
            parts.append(mixed[offset : offset + wanted])
            wanted -= len(parts[-1])
            self._given += len(parts[-1])
        batch = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self._device.type == "cuda":
            return batch.pin_memory().to(self._device, non_blocking=True)
        return batch.clone() if len(parts) == 1 else batch.to(self._device)

    @property
    def epoch(self) -> float:
        """How often every row has been given."""
        return self._given / len(self._rows)

    def state(self) -> dict[str, Any]:
        """Where it is, as plain data for JSON."""
        buffer = self._group * self._segment
        return {"given": self._given, "rows": len(self._rows), "seed": self._seed, "buffer": buffer}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state` was taken: the batches that follow are those that followed then, to the bit.

        Raises:
            InputError: the state of other rows, another seed or another buffer.
        """
        mine = self.state()
        for name in ("rows", "seed", "buffer"):
            if state.get(name) != mine[name]:
                raise InputError(
                    f"batches cannot go on: they were begun with another {'number of rows' if name == 'rows' else name}",
                    expected=str(state.get(name)),
                    found=str(mine[name]),
                    fix="give what they were begun with, or begin anew",
                )
        self._given = int(state["given"])

    def close(self) -> None:
        """End the reading ahead."""
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)
            self._reader = self._ahead = None

    def _ordered(self, epoch: int) -> tuple[Rows, Rows]:
        """The segments of an epoch in their order, and how many rows come before each group of them."""
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng([self._seed, epoch]).permutation(self._segments)
            sizes = np.full(self._segments, self._segment, np.int64)
            sizes[-1] = len(self._rows) - self._segment * (self._segments - 1)
            before = np.concatenate([[0], np.cumsum(sizes[order])])[: -1 : self._group]
            self._order = epoch, order, before
        return self._order[1:]

    def _mixed(self, epoch: int, group: int) -> torch.Tensor:
        """The rows of a group, mixed; the next group is read meanwhile."""
        key = epoch, group
        if self._held is None or self._held[0] != key:
            ahead = self._ahead if self._ahead is not None and self._ahead[0] == key else None
            self._held = None  # let go of before the next is there
            self._held = key, ahead[1].result() if ahead else self._read(epoch, group, self._ordered(epoch)[0])
            self._ahead = None
            self._read_ahead(epoch, group + 1)
        return self._held[1]

    def _read_ahead(self, epoch: int, group: int) -> None:
        order, starts = self._ordered(epoch)
        if group >= len(starts):
            return  # the next epoch's order is not drawn before its time
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, "vectors")
        self._ahead = (epoch, group), self._reader.submit(self._read, epoch, group, order)

    def _read(self, epoch: int, group: int, order: Rows) -> torch.Tensor:
        segments = order[group * self._group : (group + 1) * self._group]
        places = (np.sort(segments)[:, None] * self._segment + np.arange(self._segment)).ravel()
        vectors = self._gather(self._rows[places[places < len(self._rows)]])
        mix = np.random.default_rng([self._seed, epoch, group]).permutation(len(vectors))
        return torch.from_numpy(vectors).index_select(0, torch.from_numpy(mix))
