"""Unigram and bigram baselines for the demo model, fitted on the documents it was trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moescope.probes.demo.heldout import Passage
from moescope.probes.demo.rows import Documents, Tokens

UNIGRAM_PSEUDO_COUNTS = (0.01, 0.1, 1.0, 10.0)
BIGRAM_PSEUDO_COUNTS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_TUNING_EVERY = 10

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class BigramModel:
    """A bigram model smoothed towards an add-k unigram model.

    p(b | a) = (c(a, b) + κ · p(b)) / (c(a) + κ) and p(b) = (c(b) + k) / (N + k · V): interpolation whose
    weight on the bigram, c(a) / (c(a) + κ), grows with how often the context was seen. `counts` is ``[V,
    V]``, `context_totals` its sums over b, `unigram` ``[V]``.
    """

    counts: NDArray[np.float32]
    context_totals: Floats
    unigram: Floats
    context_pseudo_count: float

    def unigram_nll_nats(self, ids: Tokens) -> Floats:
        """NLL of every token after the first, ``[n - 1]``."""
        return np.asarray(-np.log(self.unigram[ids[1:]]))

    def nll_nats(self, ids: Tokens) -> Floats:
        """NLL of every token after the first given the one before it, ``[n - 1]``."""
        before, after = ids[:-1], ids[1:]
        smoothed = self.counts[before, after] + self.context_pseudo_count * self.unigram[after]
        return np.asarray(-np.log(smoothed / (self.context_totals[before] + self.context_pseudo_count)))


def count_bigrams(documents: Documents, *, n_tokens: int) -> NDArray[np.float32]:
    """Bigram counts ``[V, V]``, every domain weighted to the same total, as training samples them.

    The ``<eos>`` at a document's end is left out, for the held-out passages have none.
    """
    sizes = {domain: sum(len(ids) - 2 for ids in documents[domain]) for domain in documents}
    mean_size = float(np.mean(list(sizes.values())))
    pooled = np.zeros(n_tokens * n_tokens, dtype=np.float32)
    for domain, sequences in documents.items():
        keys = np.concatenate([ids[:-2] * n_tokens + ids[1:-1] for ids in sequences])
        found, times = np.unique(keys, return_counts=True)
        pooled[found] += (times * (mean_size / sizes[domain])).astype(np.float32)
    return pooled.reshape(n_tokens, n_tokens)


def fit_with(counts: NDArray[np.float32], *, unigram_k: float, bigram_k: float) -> BigramModel:
    """The model of these counts and pseudo-counts."""
    unigram_counts = counts.sum(axis=0, dtype=np.float64)
    unigram = (unigram_counts + unigram_k) / (unigram_counts.sum() + unigram_k * len(unigram_counts))
    return BigramModel(counts, counts.sum(axis=1, dtype=np.float64), unigram, bigram_k)


def fit_bigram(documents: Documents, *, n_tokens: int) -> BigramModel:
    """Fit on all `documents`, with the pseudo-counts that do best on a tenth of them, fitted on the rest."""
    fitting = {d: [s for i, s in enumerate(documents[d]) if i % _TUNING_EVERY] for d in documents}
    tuning = {d: documents[d][::_TUNING_EVERY] for d in documents}
    counts = count_bigrams(fitting, n_tokens=n_tokens)

    def tuning_nll(model: BigramModel, unigram: bool) -> float:
        score = model.unigram_nll_nats if unigram else model.nll_nats
        sample = {d: np.concatenate([ids[:-1] for ids in tuning[d]]) for d in tuning}
        return float(np.mean([score(ids).mean() for ids in sample.values()]))

    unigram_k = min(UNIGRAM_PSEUDO_COUNTS, key=lambda k: tuning_nll(fit_with(counts, unigram_k=k, bigram_k=1.0), True))
    bigram_k = min(
        BIGRAM_PSEUDO_COUNTS,
        key=lambda k: tuning_nll(fit_with(counts, unigram_k=unigram_k, bigram_k=k), False),
    )
    return fit_with(count_bigrams(documents, n_tokens=n_tokens), unigram_k=unigram_k, bigram_k=bigram_k)


def baseline_nll_nats(documents: Documents, passages: list[Passage], *, n_tokens: int) -> dict[str, dict[str, float]]:
    """Mean held-out NLL per token of each baseline, by label and for ``all`` tokens.

    ``unigram`` and ``bigram`` are fitted on all domains; ``own_bigram`` on the documents of the passage's own
    domain alone: it is told the label, which the language model is not.
    """
    pooled = fit_bigram(documents, n_tokens=n_tokens)
    values: dict[str, dict[str, list[Floats]]] = {"unigram": {}, "bigram": {}, "own_bigram": {}}
    for label in sorted({passage.label for passage in passages}):
        own = fit_bigram({label: documents[label]}, n_tokens=n_tokens)
        ids = [passage.ids for passage in passages if passage.label == label]
        values["unigram"][label] = [pooled.unigram_nll_nats(i) for i in ids]
        values["bigram"][label] = [pooled.nll_nats(i) for i in ids]
        values["own_bigram"][label] = [own.nll_nats(i) for i in ids]
    means: dict[str, dict[str, float]] = {}
    for name, by_label in values.items():
        means[name] = {label: float(np.concatenate(nll).mean()) for label, nll in by_label.items()}
        means[name]["all"] = float(np.concatenate([n for nll in by_label.values() for n in nll]).mean())
    return means
