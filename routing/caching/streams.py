"""What a cache is asked for: the experts of one layer, or of all layers as one pool, sequence by sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.routing.grid import layer_name
from moescope.routing.trace import Trace

MOST_ROWS = 2000
_LARGEST_POOL = (1 << 16) - 2


@dataclass(frozen=True)
class Sequences:
    """Where sequences lie, and which row of a result each belongs to: its document, or a group of whole documents.

    Attributes:
        starts: [sequence + 1] first token of each sequence.
        row: [sequence]; `rows` of them.
    """

    starts: NDArray[np.int64]
    row: NDArray[np.int64]
    rows: int

    def part(self, begin: int, end: int) -> Sequences:
        """The sequences from `begin` to before `end`."""
        return Sequences(self.starts[begin : end + 1], self.row[begin:end], self.rows)


@dataclass(frozen=True)
class Stream:
    """Experts in the order in which they are asked for.

    Attributes:
        layer, block: whose they are; None for the pool of all layers.
        experts: how many may take a place; null experts compute nothing and take none.
        ids: [token, use]; ids from `experts` on are passed by.
        bounds: [group + 1] columns of the uses tested together, before any of them is brought in.
    """

    layer: int | None
    block: str | None
    experts: int
    ids: NDArray[Any]
    bounds: NDArray[np.int64]

    @property
    def width(self) -> int:
        """Experts that a token asks for."""
        return int(self.ids.shape[1])

    @property
    def name(self) -> str:
        """`L3`, or `the pool`."""
        return "the pool" if self.layer is None else layer_name(self.layer, self.block or "mlp")

    def at(self, tokens: NDArray[Any]) -> Stream:
        """The same with only these tokens, in this order."""
        return replace(self, ids=self.ids[tokens])


def sequences_of(trace: Trace) -> Sequences:
    """The sequences of a trace; neighbouring documents share a row where there are more than 2,000."""
    documents = trace.n_documents
    row = trace.documents.astype(np.int64)
    if documents > MOST_ROWS:
        row = row * MOST_ROWS // documents
    return Sequences(trace.starts, row, min(documents, MOST_ROWS))


def chosen_sequences(trace: Trace, chosen: NDArray[np.bool_]) -> tuple[Sequences, NDArray[np.int64]]:
    """The sequences marked in `chosen` [sequence] as if they were all, and their tokens."""
    lengths = np.diff(trace.starts)
    tokens = np.flatnonzero(np.repeat(chosen, lengths))
    starts = np.concatenate([[0], np.cumsum(lengths[chosen])]).astype(np.int64)
    _, row = np.unique(trace.documents[chosen], return_inverse=True)
    documents = int(row.max(initial=-1)) + 1
    row = row.astype(np.int64)
    if documents > MOST_ROWS:
        row = row * MOST_ROWS // documents
    return Sequences(starts, row, min(documents, MOST_ROWS)), tokens


def layer_streams(trace: Trace) -> list[Stream]:
    """One stream a router."""
    return [
        Stream(r.layer, r.block, r.n_experts - r.n_null, r.experts, np.array([0, r.top_k], np.int64))
        for r in trace.routers
    ]


def pool_stream(trace: Trace, *, by_layer: bool = False) -> Stream:
    """All layers as one stream, layer after layer within a token.

    Args:
        by_layer: test the experts of a layer when the layer comes, instead of those of all layers before the token.
    """
    sizes = [router.n_experts - router.n_null for router in trace.routers]
    total = sum(sizes)
    if total > _LARGEST_POOL:
        raise InputError(
            f"one pool holds at most {_LARGEST_POOL:,} experts", found=f"{total:,}", fix="replay layers: pool=layer"
        )
    widths = [router.top_k for router in trace.routers]
    ends = np.cumsum([0, *widths])
    ids = np.empty((trace.tokens, ends[-1]), np.uint16)
    first = 0
    for router, size, begin, end in zip(trace.routers, sizes, ends, ends[1:], strict=False):
        ids[:, begin:end] = router.experts
        if router.n_null:
            ids[:, begin:end][router.experts >= size] = total - first  # lands on `total`, which takes no place
        ids[:, begin:end] += np.uint16(first)
        first += size
    bounds = ends if by_layer else np.array([0, ends[-1]])
    return Stream(None, None, total, ids, bounds.astype(np.int64))


def uses(stream: Stream, sequences: Sequences) -> NDArray[np.int64]:
    """[sequence] how many uses need a place."""
    lengths = np.diff(sequences.starts)
    if int(stream.ids.max(initial=0)) < stream.experts:
        return lengths * stream.width
    real = np.concatenate([[0], np.cumsum((stream.ids < stream.experts).sum(1))])
    found: NDArray[np.int64] = real[sequences.starts[1:]] - real[sequences.starts[:-1]]
    return found
