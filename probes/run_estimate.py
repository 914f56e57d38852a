"""What a recording costs, from what was counted and measured, for any choice of its probes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch

from moescope.probes.attention_reduced import query_heads
from moescope.probes.corpus_counts import CorpusCounts
from moescope.probes.measured_pass import Measured
from moescope.probes.plan import Cost, Plan
from moescope.probes.plan_budget import VECTORS, Choice
from moescope.probes.probe_costs import FORWARD
from moescope.probes.recording import Recording
from moescope.store.run_shapes import RouterShape, RunShape, VectorShape
from moescope.store.sizes import TABLES_OF, RunBytes, run_bytes
from moescope.store.vector_sampling import sampled
from moescope.store.writer import CHUNK_SECONDS

_ERROR = 0.05  # of the bytes: planned and taken were found to differ by no more, but for runs of a few blocks
WRITER_MEMORY = 96 << 20  # of DuckDB and the transaction that is being written


@dataclass(frozen=True)
class RunEstimate:
    """What was counted and measured, and what follows for any choice of probes."""

    recording: Recording
    counts: CorpusCounts
    found: Measured
    shares: Mapping[str, float]
    vectors: tuple[VectorShape, ...]
    floats: Mapping[str, float]
    first: bool

    def bytes(self, probes: Sequence[str], sample: float) -> RunBytes:
        """Bytes of a run with these probes."""
        return run_bytes(self._shape(probes, sample), probes, self.floats, first=self.first)

    def at_most(self, probes: Sequence[str], sample: float) -> int:
        """Bytes that such a run will hardly exceed: what is held against a limit."""
        return ceil(self.bytes(probes, sample).total * (1 + _ERROR))

    def plan(self, choice: Choice, budget: int | None) -> Plan:
        """The plan of what was chosen."""
        counts, recording = self.counts, self.recording
        size = self.bytes(choice.probes, choice.sample)
        seconds = self._seconds(choice.probes, size)
        whole = sum(self.shares[name] for name in (FORWARD, *choice.probes)) or 1.0
        chunk = ceil(counts.batches / size.chunks)
        costs = [Cost(FORWARD, seconds=seconds * self.shares[FORWARD] / whole, memory_bytes=self._activations())]
        for name in choice.probes:
            tables = TABLES_OF.get(name, ())
            costs.append(
                Cost(
                    name,
                    rows=self._rows(name, size, choice.sample),
                    bytes=sum(size.tables[t] for t in tables) + (sum(size.vectors.values()) if name == VECTORS else 0),
                    seconds=seconds * self.shares[name] / whole,
                    memory_bytes=round(chunk * self._waiting(name, choice.sample)),
                )
            )
        costs.append(Cost("the file itself", bytes=size.fixed + size.tables["batches"], memory_bytes=WRITER_MEMORY))
        generated = counts.sequences * recording.generate
        return Plan(
            model=recording.model.name,
            corpus=recording.corpus.name,
            probes=choice.probes,
            sites=tuple(str(site) for site in recording.context.sites) if VECTORS in choice.probes else (),
            sample=choice.sample,
            tokens=counts.tokens + generated,
            generated=generated,
            sequences=counts.sequences,
            batches=counts.batches,
            documents=recording.facts.documents,
            tokens_error=counts.error,
            bytes=size.total,
            seconds=seconds,
            memory_bytes=self.found.peak.before + sum(cost.memory_bytes for cost in costs),
            device_bytes=self.found.peak.device,
            costs=tuple(costs),
            budget=budget,
            lost=choice.lost,
            left_out=recording.left_out,
        )

    def _shape(self, probes: Sequence[str], sample: float) -> RunShape:
        anatomy, counts, generate = self.recording.model.anatomy, self.counts, self.recording.generate
        batch_seconds = self._pass_seconds() / counts.batches
        routers = [
            RouterShape(
                s.top_k or 1,
                max(1, s.n_choices),
                s.has_logits,
                s.unreachable is None,
                bool(s.n_shared) and s.block == "mlp",
            )
            for s in anatomy.moe
        ]
        return RunShape(
            tokens=counts.tokens + counts.sequences * generate,
            generated=counts.sequences * generate,
            sequences=counts.sequences,
            batches=counts.batches,
            longest=counts.longest,
            layers=anatomy.n_layers,
            routers=tuple(routers),
            d_model=anatomy.d_model,
            vocabulary=anatomy.vocabulary,
            distinct=counts.distinct if self.recording.model.tokenizer is not None else 0,
            labels=len(self.recording.facts.labels) or 1,
            labels_a_batch=counts.labels_a_batch,
            text_bytes=counts.text_bytes,
            vectors=self.vectors if VECTORS in probes else (),
            heads=query_heads(self.recording.model) if "attention" in probes else (),
            sampled=self._sampled(sample),
            batches_a_chunk=max(1, int(CHUNK_SECONDS / batch_seconds)) if batch_seconds else None,
        )

    def _sampled(self, sample: float) -> int:
        """Tokens that the sample takes: all texts hashed where they are known, else the share of them."""
        counts, seed = self.counts, self.recording.seed
        if sample == 1 or not counts.exact or self.recording.generate or not self.vectors:
            return round(sample * (counts.tokens + counts.sequences * self.recording.generate))
        rows = [(s.sequence_id, len(s.token_ids)) for batch in counts.seen for s in batch.sequences]
        sequence = np.repeat([number for number, _ in rows], [length for _, length in rows])
        position = np.concatenate([np.arange(length) for _, length in rows])
        return int(sampled(sample, seed, sequence, position).sum())

    def _pass_seconds(self) -> float:
        """All forward passes, under all probes that were asked for."""
        seen = sum(batch.tokens for batch in self.counts.seen)
        return sum(self.found.seconds[batch.number] for batch in self.counts.seen) * self.counts.tokens / seen

    def _seconds(self, probes: Sequence[str], size: RunBytes) -> float:
        kept = sum(self.shares[name] for name in (FORWARD, *probes)) / (sum(self.shares.values()) or 1.0)
        # Where a core is left to the writer, only its last chunk is waited for.
        beside = torch.get_num_threads() < (os.cpu_count() or 1)
        last = self.counts.batches - (size.chunks - 1) * ceil(self.counts.batches / size.chunks)
        waited = max(1, last) if beside else self.counts.batches
        return (self._pass_seconds() + self.found.write_seconds * waited) * kept

    def _activations(self) -> int:
        return self.found.peak.added

    def _waiting(self, probe: str, sample: float) -> float:
        """Bytes of a batch's records of one probe, while they wait."""
        tables = TABLES_OF.get(probe, ())
        held: list[int] = [sum(batch[t].nbytes for t in tables if t in batch) for batch in self.found.tables]
        vectors = sum(v.width * v.itemsize * v.per_token for v in self.vectors) if probe == VECTORS else 0
        return sum(held) / max(1, len(held)) + vectors * sample * self.counts.tokens / self.counts.batches

    def _rows(self, probe: str, size: RunBytes, sample: float) -> int:
        vectors = sum(v.per_token for v in self.vectors) * self._sampled(sample) if probe == VECTORS else 0
        return sum(size.rows[t] for t in TABLES_OF.get(probe, ())) + vectors
