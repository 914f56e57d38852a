"""Batches as a model's recorder would hand them over, made of random numbers: rows to measure a store with.

A token's state is its id's vector, its domain's and an AR(1) process along the sequence; every layer turns it a little and
its router reads it through a matrix of its own, so ids, domains, neighbours and layers all depend on each other, as in a
model. Weights are float32 softmaxes over all experts, not renormalised (as OLMoE's); margins and entropies follow from the
same logits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.sites import EXPERT_INDICES, ROUTER_LOGITS, Site
from moescope.store.coverage import Expectation
from moescope.store.ending import end_run
from moescope.store.run import Run
from moescope.store.store import Store
from moescope.store.totals import ExpertPartial, LoadPartial
from moescope.store.writer import BatchRecords, RunWriter

_WIDTH = 32  # of a token's state
_MEMORY = 0.8  # of the AR(1) process along a sequence
_CLASSES = ("word", "word", "word", "fragment", "fragment", "space", "punctuation", "digit")
_D_EXPERT = 1024
_DECISIONS = "SELECT sum(len(experts)) FROM routing WHERE run_id = $run AND layer = $layer AND block = $block"
_ENTROPIES = "SELECT count(entropy) FROM routing WHERE run_id = $run AND layer = $layer AND block = $block"
_RULE = {
    "score": "softmax", "choice": "score", "bias": None, "groups": None, "renormalise": False, "scale": 1.0,
    "scale_by": None, "jitter": 0.0, "dtype": "float32", "agreement": 1.0, "choice_agreement": 1.0,
    "weight_agreement": 1.0, "tokens": 4096, "verified": True, "choice_verified": True, "text": "top-k of softmax",
}  # fmt: skip

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class SyntheticRun:
    """What to make.

    Attributes:
        tokens: in all; the last sequence may be shorter.
        length: tokens of a sequence, each a document of its own.
        sequences_a_batch: as the recorder's batch size.
        layers, experts, top_k: of the model.
        domains: labels.
        vocabulary: token ids, drawn by a Zipf law.
        logits, norms: whether `router_logits` and `expert_outputs` get rows.
        inside: whether `experts` gets rows.
        seed: of everything random.
    """

    tokens: int
    length: int = 512
    sequences_a_batch: int = 8
    layers: int = 16
    experts: int = 64
    top_k: int = 8
    domains: int = 10
    vocabulary: int = 20_000
    logits: bool = False
    norms: bool = False
    inside: bool = True
    seed: int = 0

    @property
    def decisions(self) -> int:
        """Tokens × routers × k."""
        return self.tokens * self.layers * self.top_k

    @property
    def sequences(self) -> int:
        """How many sequences the tokens make."""
        return -(-self.tokens // self.length)

    def write(self, store: Store, name: str) -> Run:
        """Record all of it as a run of its own, ledger and status included."""
        run = self.begin(store, name)
        writer = RunWriter(store, run.run_id)
        for batch in self.batches():
            writer.submit(lambda batch=batch: batch)
        writer.close()
        self.end(store, run)
        return run

    def begin(self, store: Store, name: str) -> Run:
        """The run and its layers."""
        run = store.begin_run(
            name=name, model="synthetic", revision="0", architecture="SyntheticMoeForCausalLM",
            settings={"probes": ["tokens", "routing", "experts"]}, versions={}, seed=self.seed,
            corpus_fingerprint=hashlib.sha256(repr(self).encode()).hexdigest(),
            anatomy={"n_layers": self.layers, "d_model": 1024, "vocabulary": self.vocabulary},
        )  # fmt: skip
        store.add_layers(run, [self._layer(layer) for layer in range(self.layers)])
        return run

    def end(self, store: Store, run: Run) -> None:
        """The ledger and the final status."""
        counted = [("sequences", self.sequences), ("tokens", self.tokens)]
        expectations = [Expectation(t, n, f"SELECT count(*) FROM {t} WHERE run_id = $run") for t, n in counted]
        for layer in range(self.layers):
            decided, scored = Site(layer, "mlp", EXPERT_INDICES), Site(layer, "mlp", ROUTER_LOGITS)
            expectations += [
                Expectation(str(decided), self.tokens * self.top_k, _DECISIONS, layer, "mlp"),
                Expectation(str(scored), self.tokens, _ENTROPIES, layer, "mlp"),
            ]
        counts = {"tokens": self.tokens, "generated_tokens": 0, "sequences": self.sequences}
        end_run(store, run, expectations, {**counts, "documents": self.sequences, "stopped": None}, failed=False)

    def batches(self) -> Iterator[BatchRecords]:
        """The batches in order, each made anew: the same ones every time."""
        first = np.arange(0, self.tokens, self.length)
        lengths = np.minimum(self.length, self.tokens - first)
        rng = np.random.default_rng([self.seed, 1])
        for number, start in enumerate(range(0, self.sequences, self.sequences_a_batch)):
            stop = min(start + self.sequences_a_batch, self.sequences)
            yield self._batch(number, start, lengths[start:stop], int(first[start]), rng)

    @cached_property
    def _model(self) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, 0])

        def normal(*shape: int, scale: float = 1.0) -> Floats:
            return rng.standard_normal(shape, np.float32) * np.float32(scale)

        zipf = 1 / np.arange(1, self.vocabulary + 1) ** 1.05
        return {
            "ids": normal(self.vocabulary, _WIDTH),
            "domains": normal(self.domains, _WIDTH, scale=0.6),
            "turn": normal(self.layers, _WIDTH, _WIDTH, scale=0.25 / _WIDTH**0.5),
            "router": normal(self.layers, _WIDTH, self.experts, scale=1.0 / _WIDTH**0.5),
            "bias": normal(self.layers, self.experts, scale=0.5),
            "norm": np.exp(normal(self.layers, self.experts, scale=0.4)),
            "zipf": np.cumsum(zipf / zipf.sum()),
            "order": np.stack([rng.permutation(self.vocabulary) for _ in range(self.domains)]),
        }

    def _batch(
        self, number: int, start: int, lengths: NDArray[np.int64], first: int, rng: np.random.Generator
    ) -> BatchRecords:
        domains = np.arange(start, start + len(lengths)) % self.domains
        tokens = int(lengths.sum())
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        position = np.concatenate([np.arange(n) for n in lengths])
        ids = self._ids(domains[sequence], rng)
        state = self._states(ids, domains, sequence, position, lengths, rng)
        records = BatchRecords(number, (start, len(lengths), tokens))
        token = np.arange(first, first + tokens)
        place = _Place(token, domains[sequence], sequence, position)
        records.tables["tokens"] = self._token_rows(place, start, ids, rng)
        records.tables["sequences"] = self._sequence_rows(start, domains, lengths, ids, sequence)
        if number == 0:
            records.tables["vocabulary"] = self._pieces()
        for layer in range(self.layers):
            state = state + np.tanh(state @ self._model["turn"][layer])
            self._layer_rows(records, layer, place, state, rng)
        return records

    def _ids(self, domain: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """Half of the ids by a Zipf law of the language, half by one of the domain."""
        rank = np.searchsorted(self._model["zipf"], rng.random(len(domain))).clip(max=self.vocabulary - 1)
        return np.where(rng.random(len(domain)) < 0.5, rank, self._model["order"][domain, rank])

    def _states(
        self,
        ids: NDArray[np.int64],
        domains: NDArray[np.int64],
        sequence: NDArray[np.int64],
        position: NDArray[np.int64],
        lengths: NDArray[np.int64],
        rng: np.random.Generator,
    ) -> Floats:
        along = np.empty((len(lengths), int(lengths.max()), _WIDTH), np.float32)
        noise = rng.standard_normal(along.shape, np.float32)
        along[:, 0] = noise[:, 0]
        for t in range(1, along.shape[1]):
            along[:, t] = _MEMORY * along[:, t - 1] + np.float32((1 - _MEMORY**2) ** 0.5) * noise[:, t]
        state: Floats = self._model["ids"][ids] + self._model["domains"][domains[sequence]] + along[sequence, position]
        return state

    def _token_rows(self, place: _Place, start: int, ids: NDArray[np.int64], rng: np.random.Generator) -> pa.Table:
        following = np.append(ids[1:], 0)
        guess = self._ids(place.domain, rng)
        nll = rng.exponential(2.5, len(ids)).astype(np.float32)
        classes = pa.DictionaryArray.from_arrays(pa.array((ids % len(_CLASSES)).astype(np.int8)), pa.array(_CLASSES))
        return pa.table(
            {
                "token": place.token,
                "sequence_id": start + place.sequence,
                "position": place.position.astype(np.int32),
                "token_id": ids.astype(np.int32),
                "phase": _same("prefill", len(ids)),
                "nll": pa.array(nll, mask=place.position == 0),
                "predicted_id": np.where(rng.random(len(ids)) < 0.35, following, guess).astype(np.int32),
                "is_special": np.zeros(len(ids), bool),
                "class": classes,
            }
        )

    def _sequence_rows(
        self,
        start: int,
        domains: NDArray[np.int64],
        lengths: NDArray[np.int64],
        ids: NDArray[np.int64],
        sequence: NDArray[np.int64],
    ) -> pa.Table:
        digests = [hashlib.sha256(ids[sequence == i].tobytes()).hexdigest() for i in range(len(lengths))]
        numbers = np.arange(start, start + len(lengths))
        return pa.table(
            {
                "sequence_id": numbers,
                "document_id": numbers,
                "part": np.zeros(len(lengths), np.int32),
                "label": [f"domain{domain}" for domain in domains],
                "source": _same("synthetic", len(lengths)),
                "text": [" ".join(f"t{i}" for i in ids[sequence == n]) for n in range(len(lengths))],
                "n_tokens": lengths.astype(np.int32),
                "content_hash": digests,
            }
        )

    def _pieces(self) -> pa.Table:
        ids = np.arange(self.vocabulary, dtype=np.int32)
        pieces = [f" t{i}" for i in ids]
        return pa.table({"token_id": ids, "bytes": [p.encode() for p in pieces], "text": pieces})

    def _layer_rows(
        self, records: BatchRecords, layer: int, place: _Place, state: Floats, rng: np.random.Generator
    ) -> None:
        model, rows, k = self._model, len(state), self.top_k
        logits: Floats = state @ model["router"][layer] + model["bias"][layer]
        logits += rng.standard_normal(logits.shape, np.float32) * np.float32(0.3)
        best = np.argpartition(-logits, k, axis=1)[:, : k + 1].astype(np.int64)
        order = np.lexsort((best, -np.take_along_axis(logits, best, 1)), axis=1)
        best = np.take_along_axis(best, order, 1)
        chosen, found = best[:, :k], np.take_along_axis(logits, best, 1)
        shares = np.exp(logits - found[:, :1])
        shares /= shares.sum(1, keepdims=True)
        weights = np.take_along_axis(shares, chosen, 1)
        where = {"token": place.token, "layer": np.full(rows, layer, np.uint16), "block": _same("mlp", rows)}
        _add(
            records, "routing",
            {
                **where,
                "experts": _lists(chosen.astype(np.uint16)),
                "weights": _lists(weights),
                "margin": found[:, k - 1] - found[:, k],
                "entropy": -(shares * np.log(np.maximum(shares, 1e-30))).sum(1),
            },
        )  # fmt: skip
        records.loads += self._loads(layer, place.domain, chosen, weights)
        if self.logits:
            _add(records, "router_logits", {**where, "logits": _lists(logits)})
        if not (self.inside or self.norms):
            return
        norms = model["norm"][layer][chosen] * np.exp(0.25 * rng.standard_normal(chosen.shape, np.float32))
        if self.norms:
            _add(records, "expert_outputs", {**where, "norms": _lists(norms)})
        if self.inside:
            records.experts.append(self._reductions(layer, place.token, chosen, weights, norms))

    def _loads(
        self, layer: int, domain: NDArray[np.int64], chosen: NDArray[np.int64], weights: Floats
    ) -> list[LoadPartial]:
        key, size = (domain[:, None] * self.experts + chosen).ravel(), self.domains * self.experts
        tokens = np.bincount(key, minlength=size).reshape(-1, self.experts)
        sums = np.bincount(key, weights.ravel().astype(np.float64), size).reshape(-1, self.experts)
        seen = np.unique(domain)
        return [LoadPartial(layer, "mlp", f"domain{d}", "prefill", tokens[d], sums[d]) for d in seen]

    def _reductions(
        self, layer: int, token: NDArray[np.int64], chosen: NDArray[np.int64], weights: Floats, norms: Floats
    ) -> ExpertPartial:
        experts, key = self.experts, chosen.ravel()
        tokens = np.bincount(key, minlength=experts)

        def summed(values: Floats) -> NDArray[np.float64]:
            return np.bincount(key, values.ravel().astype(np.float64), experts)

        order = np.lexsort((np.repeat(token, self.top_k), -norms.ravel(), key))
        used, at = np.unique(key[order], return_index=True)
        peak, peak_token = np.zeros(experts, np.float32), np.full(experts, -1)
        peak[used] = norms.ravel()[order[at]] / 4
        peak_token[used] = np.repeat(token, self.top_k)[order[at]]
        neurons = tokens * _D_EXPERT
        channel = (np.arange(experts) * 7 + layer) % 1024
        return ExpertPartial(
            layer, "mlp", tokens, summed(weights), summed(norms), summed(weights * norms), peak, channel, peak_token,
            neurons, neurons * 3 // 10, np.zeros(experts, np.int64),
        )  # fmt: skip

    def _layer(self, layer: int) -> Mapping[str, Any]:
        return {
            "layer": layer, "block": "mlp", "stack": "decoder", "kind": "moe", "n_experts": self.experts,
            "top_k": self.top_k, "n_shared": 0, "n_null": 0, "d_expert": _D_EXPERT, "routing_rule": json.dumps(_RULE),
        }  # fmt: skip


@dataclass(frozen=True)
class _Place:
    """[token] The rows of a batch: run-wide token, domain, sequence in the batch, position in the sequence."""

    token: NDArray[np.int64]
    domain: NDArray[np.int64]
    sequence: NDArray[np.int64]
    position: NDArray[np.int64]


def _same(value: str, rows: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int8)), pa.array([value]))


def _lists(values: NDArray[Any]) -> pa.Array:
    rows, width = values.shape
    offsets = pa.array(np.arange(0, rows * width + 1, width, dtype=np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(values).ravel()))


def _add(records: BatchRecords, table: str, columns: Mapping[str, Any]) -> None:
    rows = pa.table(dict(columns))
    before = records.tables.get(table)
    records.tables[table] = rows if before is None else pa.concat_tables([before, rows])
