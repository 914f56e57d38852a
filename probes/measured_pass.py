"""A short measured pass: a few batches that stand for all, run and written as a recording does, into a store thrown away."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pyarrow as pa
import torch

from moescope.core.errors import InputError
from moescope.probes.batches import Batch
from moescope.probes.passes import BatchSteps, Passes, joined
from moescope.probes.peak_memory import Peak, free_host, watched
from moescope.probes.probe import Probe
from moescope.probes.recording import Recording
from moescope.store.writer import BatchRecords, RunWriter

_STRATA = 5
_ROUNDS, _ENOUGH = 10, 2.0  # at most so many rounds, until they took so many seconds
_LONG = 10.0  # seconds of a round from which on there is no second; else there are two
_STEPS = 8  # generated tokens that are measured; each further one takes as long


@dataclass
class Measured:
    """What the pass found.

    Attributes:
        seconds: number of a batch → seconds of its passes, rows made beside them; for every batch that was seen.
        write_seconds: what it takes to write the rows of one batch, on average.
        tables: table → rows, for each batch that was run.
        record_bytes: records of one batch in memory, on average.
        peak: memory while the largest batch ran.
    """

    seconds: dict[int, float] = field(default_factory=dict)
    write_seconds: float = 0.0
    tables: list[Mapping[str, pa.Table]] = field(default_factory=list)
    record_bytes: float = 0.0
    peak: Peak = field(default_factory=lambda: Peak(0))


def measure(recording: Recording, seen: Sequence[Batch]) -> Measured:
    """Run batches of each size under all probes of `recording`, in turn, and its largest with an eye on the memory.

    Args:
        recording: everything checked and nothing run; its store takes the rows, and is to be thrown away.
        seen: batches of its plan, or of a sample of its corpus.

    Raises:
        InputError: the largest batch will not fit the memory that is free.
    """
    strata = _strata(seen)
    stand_for = [stratum[len(stratum) // 2] for stratum in strata]
    largest = max(seen, key=places)
    found = Measured()
    run = recording.store.begin_run(name="plan")
    writer = RunWriter(recording.store, run.run_id)
    stream = _Stream(recording, writer)
    try:
        with watched(_devices(recording)) as first:
            stream.seconds_of(stand_for[0])  # warms up, and is not counted
        _check_memory(first, stand_for[0], largest)
        taken = _in_turn(stream, stand_for)
        with watched(_devices(recording)) as found.peak:
            stream.seconds_of(largest)
    finally:
        started = time.perf_counter()
        writer.close()
    found.write_seconds = (time.perf_counter() - started) / len(stream.records)
    for stratum, middle, seconds in zip(strata, stand_for, taken, strict=True):
        found.seconds |= {batch.number: seconds * places(batch) / places(middle) for batch in stratum}
    found.tables = [records.tables for records in stream.records]
    found.record_bytes = statistics.mean(map(_nbytes, stream.records))
    return found


def places(batch: Batch) -> int:
    """Places of a batch once padded: what the model computes."""
    return len(batch.sequences) * int(batch.lengths.max())


def records_of(steps: BatchSteps, probes: Sequence[Probe], first_token: int) -> BatchRecords:
    """The rows that probes make of a batch that has run."""
    parts = []
    for host in steps.host_batches(first_token):
        parts.append(BatchRecords(steps.batch.number, (0, 0, 0)))
        for probe in probes:
            probe.rows(host, parts[-1])
    return joined(steps.batch, steps.batch.tokens + int(steps.generated.sum()), parts)


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Stream:
    """Batches one after the other, as in a recording: rows are made beside the next pass, and written at the end."""

    def __init__(self, recording: Recording, writer: RunWriter) -> None:
        self.recording, self.writer = recording, writer
        self.records: list[BatchRecords] = []
        self._tokens = 0

    def seconds_of(self, batch: Batch) -> float:
        """Seconds of a batch; of a long answer a beginning is measured, and the rest counted like it."""
        generate = self.recording.generate
        if generate <= _STEPS:
            return self._run(batch, generate)
        text, answer = self._run(batch, 0), self._run(batch, _STEPS)
        return text + max(0.0, answer - text) * generate / _STEPS

    def _run(self, batch: Batch, generate: int) -> float:
        recording = self.recording
        passes = Passes(recording.model, recording.probes, recording.context, generate=generate, side=recording.side)
        with passes.open():
            wait_for(recording.model.device)
            started = time.perf_counter()
            finish = passes.run(batch)
            self.writer.submit(lambda: self._rows(finish))
            wait_for(recording.model.device)
            return time.perf_counter() - started

    def _rows(self, finish: Callable[[], BatchSteps]) -> BatchRecords:
        records = records_of(finish(), self.recording.probes, self._tokens)
        self._tokens += records.batch[2]
        self.records.append(records)
        return records


def _strata(seen: Sequence[Batch]) -> list[list[Batch]]:
    """Batches by size, in a few parts of equal number; of a small corpus fewer, or the pass would be longer than the run."""
    ordered = sorted(seen, key=places)
    parts = min(_STRATA, -(-len(ordered) // _STRATA))
    cuts = [len(ordered) * part // parts for part in range(parts + 1)]
    return [ordered[first:end] for first, end in pairwise(cuts)]


def _in_turn(stream: _Stream, batches: Sequence[Batch]) -> list[float]:
    """Seconds of each batch: the median of rounds, so that what else the machine does falls on all of them alike."""
    rounds: list[list[float]] = []
    while len(rounds) < _ROUNDS:
        rounds.append([stream.seconds_of(batch) for batch in batches])
        spent = sum(map(sum, rounds))
        if spent > _LONG or (len(rounds) > 1 and spent > _ENOUGH):
            break
    return [statistics.median(each) for each in zip(*rounds, strict=True)]


def _check_memory(first: Peak, run: Batch, largest: Batch) -> None:
    free = free_host()
    expected = first.added * places(largest) / places(run)
    if free is not None and not first.device and expected > free:
        rows = max(1, int(len(largest.sequences) * free / expected))
        raise InputError(
            "a batch of the longest texts does not fit the memory",
            expected=f"about {expected / 2**30:.1f} GiB beside the model",
            found=f"{free / 2**30:.1f} GiB free",
            fix=f"batch_size={rows} would fit (--batch-size {rows}), or a lower max_length (--max-length)",
        )


def _devices(recording: Recording) -> list[torch.device]:
    return [torch.device(name) for name in dict.fromkeys(recording.model.devices)]


def _nbytes(records: BatchRecords) -> int:
    tables: int = sum(t.nbytes for t in records.tables.values())
    return tables + sum(v.nbytes for v in records.vectors)
