"""Steps: several tokens served together ask for each of their experts once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moescope.routing.caching.streams import Sequences, Stream


def in_steps(streams: list[Stream], sequences: Sequences, batch: int) -> tuple[list[Stream], Sequences]:
    """Streams in which `batch` consecutive tokens of a sequence are one: their different experts, in order of first use.

    The last step of a sequence may hold fewer tokens. Places that a step does not fill hold ids that need no room.

    Example:
        >>> ids = np.array([[0, 1], [1, 2], [0, 2]], np.uint16)
        >>> stream = Stream(0, "mlp", 4, ids, np.array([0, 2], np.int64))
        >>> steps, _ = in_steps([stream], Sequences(np.array([0, 3]), np.array([0]), 1), 2)
        >>> steps[0].ids.tolist()
        [[0, 1, 2, 4], [0, 2, 4, 4]]
    """
    if batch == 1:
        return streams, sequences
    from moescope.routing.caching.step_kernel import unite

    counts = -(-np.diff(sequences.starts) // batch)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    found = []
    for stream in streams:
        width = min(batch * stream.width, stream.experts)
        ids = np.full((starts[-1], width), stream.experts, np.uint16)
        unite(stream.ids, sequences.starts, starts, batch, stream.experts, ids)
        found.append(replace(stream, ids=ids, bounds=np.array([0, width], np.int64)))
    return found, Sequences(starts, sequences.row, sequences.rows)
