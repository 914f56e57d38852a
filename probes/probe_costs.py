"""What each probe adds to a forward pass: the same batch plain and under one probe after the other, in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from moescope.core.probe import ProbeEntry
from moescope.probes.batches import Batch
from moescope.probes.forward import time_plain, to_device
from moescope.probes.generation import continue_greedily
from moescope.probes.measured_pass import records_of, wait_for
from moescope.probes.passes import Passes
from moescope.probes.recording import Recording
from moescope.store.run_shapes import VectorShape
from moescope.store.vector_shards import DTYPES
from moescope.store.writer import BatchRecords

FORWARD = "forward pass"
_ROUNDS = 2
_LONG = 0.5  # seconds of a plain pass
_STEPS = 4


def probe_seconds(recording: Recording, batch: Batch) -> dict[str, float]:
    """Seconds that each probe adds to a batch, its rows made included, and those of the model alone (`forward pass`).

    Args:
        recording: everything checked and nothing run.
        batch: is run twice for each probe; of one that takes long only the first texts.
    """
    taken = _plain(recording, batch, min(recording.generate, _STEPS))
    if taken > _LONG:
        batch = replace(batch, sequences=batch.sequences[: max(1, int(len(batch.sequences) * _LONG / taken))])
    generate = min(recording.generate, _STEPS)
    base = [entry for entry in recording.entries if entry.name == "tokens"]
    ways: dict[str, Callable[[], float]] = {FORWARD: lambda: _plain(recording, batch, generate)}
    for entry in recording.entries:
        chosen = base if entry in base else [*base, entry]
        ways[entry.name] = lambda chosen=chosen: _under(recording, chosen, batch, generate)[0]  # type: ignore[misc]  # bound now, not when called
    rounds = [{name: run() for name, run in ways.items()} for _ in range(_ROUNDS)]
    least = {name: min(times[name] for times in rounds) for name in ways}
    tokens = least.get("tokens", least[FORWARD])
    added = {name: max(0.0, seconds - tokens) for name, seconds in least.items() if name not in (FORWARD, "tokens")}
    return {FORWARD: min(least[FORWARD], tokens), "tokens": max(0.0, tokens - least[FORWARD]), **added}


def vector_shapes(recording: Recording, batch: Batch) -> tuple[VectorShape, ...]:
    """What is kept at each site for a sampled token, found by keeping all of a short batch."""
    entries = [entry for entry in recording.entries if entry.name == "activations"]
    if not entries:
        return ()
    _, records = _under(recording, entries, batch, 0, share=1.0)
    return tuple(
        VectorShape(
            rows.site,
            int(np.prod(rows.vectors.shape[1:], dtype=np.int64)),
            np.dtype(DTYPES[rows.dtype][1]).itemsize,
            round(len(rows.vectors) / rows.tokens),
            rows.expert is not None,
        )
        for rows in records.vectors
    )


def _under(
    recording: Recording, entries: Sequence[ProbeEntry], batch: Batch, generate: int, *, share: float | None = None
) -> tuple[float, BatchRecords]:
    """Seconds of a batch under some probes, their rows made, and the rows."""
    context = replace(recording.context, problems={}, _reported={})
    if share is not None:
        context.share = share
    probes = [entry.function(context) for entry in entries]
    passes = Passes(recording.model, probes, context, generate=generate, side=recording.side)
    with passes.open():
        wait_for(recording.model.device)
        started = time.perf_counter()
        records = records_of(passes.run(batch)(), probes, 0)
        return time.perf_counter() - started, records


def _plain(recording: Recording, batch: Batch, generate: int) -> float:
    model = recording.model
    if not generate:
        return time_plain(model, [batch], side=recording.side)
    on_device = to_device(batch, model, side=recording.side)
    with torch.no_grad():
        started = time.perf_counter()
        continue_greedily(model, on_device, generate, before=lambda _: None, after=lambda _: None)
        wait_for(model.device)
        return time.perf_counter() - started
