"""Probe `tokens`: every sequence and token, with the model's negative log-likelihood."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from moescope.core.probe import probe
from moescope.core.sites import Site
from moescope.probes.anatomy import Anatomy
from moescope.probes.arrow_rows import constant
from moescope.probes.pieces import Pieces
from moescope.probes.probe import HostBatch, Probe, ProbeContext, Tensors
from moescope.store.coverage import Expectation
from moescope.store.writer import BatchRecords


@probe(name="tokens", tables=("tokens", "sequences", "vocabulary"), default=True)
class TokensProbe(Probe):
    """Tokens with position, class, NLL in nats and the model's next prediction; needs no site, only the logits."""

    def __init__(self, context: ProbeContext) -> None:
        super().__init__(context)
        self._pieces = Pieces(context.tokenizer)

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """None: NLL comes from the model's output."""
        return []

    def tap(self, site: Site, tensors: Tensors) -> Tensors:
        """Never called."""
        raise NotImplementedError

    def rows(self, host: HostBatch, records: BatchRecords) -> None:
        """Rows of `sequences`, `tokens` and, for ids not seen before, `vocabulary`."""
        sequences = host.batch.sequences
        lengths = host.batch.lengths
        ids = np.concatenate([s.token_ids for s in sequences])
        position = np.concatenate([np.arange(n) for n in lengths])
        nll = host.outputs["nll"].take(host.real)
        predicted = host.outputs["predicted_id"].take(host.real)
        if not np.isfinite(nll[position > 0]).all():
            self.context.report(
                "tokens", "some negative log-likelihoods are NaN or infinite: the model's logits overflowed"
            )
        special, classes = self._pieces.describe(ids)
        records.tables["sequences"] = pa.table(
            {
                "sequence_id": pa.array([s.sequence_id for s in sequences], pa.int64()),
                "document_id": pa.array([s.document_id for s in sequences], pa.int64()),
                "part": pa.array([s.part for s in sequences], pa.int32()),
                "label": pa.array([s.document.label for s in sequences], pa.string()),
                "source": pa.array([s.document.source for s in sequences], pa.string()),
                "text": pa.array([s.text for s in sequences], pa.string()),
                "n_tokens": pa.array(lengths, pa.int32()),
                "content_hash": pa.array([s.content_hash for s in sequences], pa.string()),
                "metadata": pa.array([s.metadata_json for s in sequences], pa.string()),
            }
        )
        records.tables["tokens"] = pa.table(
            {
                "token": host.token,
                "sequence_id": np.repeat([s.sequence_id for s in sequences], lengths),
                "position": pa.array(position, pa.int32()),
                "token_id": pa.array(ids, pa.int32()),
                "phase": constant("prefill", len(ids)),
                "nll": pa.array(nll, pa.float32(), mask=position == 0),
                "predicted_id": pa.array(predicted, pa.int32()),
                "is_special": pa.array(special),
                "class": classes,
            }
        )
        fresh = self._pieces.unseen(np.concatenate([ids, predicted]))
        if fresh.num_rows:
            records.tables["vocabulary"] = fresh

    def expectations(self, tokens: int, sequences: int) -> list[Expectation]:
        """A row a token, a row a sequence, and an NLL for every token but the first of a sequence."""
        problem = self.context.problems.get("tokens")
        return [
            Expectation("sequences", sequences, "SELECT count(*) FROM sequences WHERE run_id = $run"),
            Expectation("tokens", tokens, "SELECT count(*) FROM tokens WHERE run_id = $run"),
            Expectation(
                "tokens.nll", tokens - sequences, "SELECT count(nll) FROM tokens WHERE run_id = $run", problem=problem
            ),
        ]
