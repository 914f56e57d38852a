"""Probe `tokens`: every sequence and token, with the model's negative log-likelihood."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.probe import probe
from moescope.core.sites import Site
from moescope.probes.anatomy import Anatomy
from moescope.probes.pieces import Pieces
from moescope.probes.probe import HostBatch, Probe, ProbeContext, Tensors
from moescope.store.coverage import Expectation
from moescope.store.writer import BatchRecords

PHASES = ("prefill", "decode")


@probe(name="tokens", tables=("tokens", "sequences", "vocabulary"), default=True)
class TokensProbe(Probe):
    """Tokens with position, class, NLL in nats and the model's next prediction; needs no site. Without logits neither of the two."""

    def __init__(self, context: ProbeContext) -> None:
        super().__init__(context)
        self._pieces = Pieces(context.tokenizer)
        self._predicted = True

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """None: NLL comes from the model's output."""
        return []

    def tap(self, site: Site, tensors: Tensors) -> Tensors:
        """Never called."""
        raise NotImplementedError

    def rows(self, host: HostBatch, records: BatchRecords) -> None:
        """Rows of `sequences`, `tokens` and, for ids not seen before, `vocabulary`."""
        sequences = host.batch.sequences
        ids = host.ids.take(host.real)
        nll, predicted, seen = self._predictions(host, ids)
        special, classes = self._pieces.describe(ids)
        if host.phase == "prefill":
            records.tables["sequences"] = _sequence_rows(host)
        records.tables["tokens"] = pa.table(
            {
                "token": host.token,
                "sequence_id": np.array([s.sequence_id for s in sequences])[host.row],
                "position": pa.array(host.position, pa.int32()),
                "token_id": pa.array(ids, pa.int32()),
                "phase": _phase(host.phase, len(ids)),
                "nll": nll,
                "predicted_id": predicted,
                "is_special": pa.array(special),
                "class": classes,
            }
        )
        fresh = self._pieces.unseen(seen)
        if fresh.num_rows:
            records.tables["vocabulary"] = fresh

    def _predictions(self, host: HostBatch, ids: NDArray[np.int64]) -> tuple[pa.Array, pa.Array, NDArray[np.int64]]:
        """NLL and prediction of each token, null where the pass was stopped before its logits, and every id named."""
        self._predicted = "nll" in host.outputs
        if not self._predicted:
            return pa.nulls(len(ids), pa.float32()), pa.nulls(len(ids), pa.int32()), ids
        nll, predicted = (host.outputs[name].take(host.real) for name in ("nll", "predicted_id"))
        first = host.position == 0
        if not np.isfinite(nll[~first]).all():
            self.context.report(
                "tokens",
                "some negative log-likelihoods are NaN or infinite: the model's logits overflowed; record it in another "
                "dtype (float32, bfloat16)",
            )
        named = np.concatenate([ids, predicted])
        return pa.array(nll, pa.float32(), mask=first), pa.array(predicted, pa.int32()), named

    def state(self) -> dict[str, Any]:
        """That passes give no logits, where they do not."""
        return {} if self._predicted else {"predicted": False}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on with passes as they were."""
        self._predicted = bool(state.get("predicted", True))

    def expectations(self, tokens: int, sequences: int) -> list[Expectation]:
        """A row a token, a row a sequence, and, where passes gave logits, an NLL for every token but a sequence's first."""
        problem = self.context.problems.get("tokens")
        found = [
            Expectation("sequences", sequences, "SELECT count(*) FROM sequences WHERE run_id = $run"),
            Expectation("tokens", tokens, "SELECT count(*) FROM tokens WHERE run_id = $run"),
        ]
        if self._predicted:
            query = "SELECT count(nll) FROM tokens WHERE run_id = $run"
            found.append(Expectation("tokens.nll", tokens - sequences, query, problem=problem))
        return found


def _phase(phase: str, rows: int) -> pa.Array:
    # One dictionary for all steps: tables whose dictionaries differ cannot be read as one.
    return pa.DictionaryArray.from_arrays(pa.array(np.full(rows, PHASES.index(phase), np.int8)), pa.array(PHASES))


def _sequence_rows(host: HostBatch) -> pa.Table:
    sequences = host.batch.sequences
    return pa.table(
        {
            "sequence_id": pa.array([s.sequence_id for s in sequences], pa.int64()),
            "document_id": pa.array([s.document_id for s in sequences], pa.int64()),
            "part": pa.array([s.part for s in sequences], pa.int32()),
            "label": pa.array([s.document.label for s in sequences], pa.string()),
            "source": pa.array([s.document.source for s in sequences], pa.string()),
            "text": pa.array([s.text for s in sequences], pa.string()),
            "n_tokens": pa.array(host.lengths, pa.int32()),
            "content_hash": pa.array([s.content_hash for s in sequences], pa.string()),
            "metadata": pa.array([s.metadata_json for s in sequences], pa.string()),
        }
    )
