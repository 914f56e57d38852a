"""Scores of attention heads planted as rows: what the protocols for retrieval, induction and head roles write."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from moescope.store.head_totals import fold_heads
from moescope.store.run import Run

# Metric → how large it is at most.
SCORES = {
    "retrieval score": 0.6, "retrieval score, each place once": 0.6, "retrieval activation": 1.0, "retrieval score, answer given": 0.7,
    "even choice of key": 0.01, "even choice of key, each place once": 0.01, "even choice of key, activation": 0.05,
    "even choice of key, answer given": 0.01, "induction": 0.9, "echo": 0.5, "previous token": 0.9,
    "induction, mean over copies": 0.4, "echo, mean over copies": 0.3, "other offset": 0.02, "other offset, mean over copies": 0.01,
    "other offset, one key": 0.02, "recovered mass, special": 0.5, "recovered mass, + punctuation": 0.6,
    "recovered mass, + frequent": 0.96, "recovered mass, + local": 0.99, "even attention, special": 0.05,
    "even attention, + punctuation": 0.1, "even attention, + frequent": 0.4, "even attention, + local": 0.7,
}  # fmt: skip


def plant_head_scores(run: Run, *, sequences: int, layers: int, heads: int = 4, n: int = 10) -> None:
    """Write rows of `head_sequences`, and `heads` from them, for sequences that are there already, numbered from 0."""
    random = np.random.default_rng(layers)
    rows = [
        {
            "sequence_id": sequence, "layer": layer, "block": "attn", "metric": metric, "condition": "base",
            "sums": (n * most * random.random(heads)).tolist(), "n": n,
        }
        for sequence in range(sequences)
        for layer in range(layers)
        for metric, most in SCORES.items()
    ]  # fmt: skip
    cursor = run.store.cursor()
    cursor.register("planted_scores", pa.Table.from_pylist(rows))
    cursor.execute("INSERT INTO head_sequences BY NAME SELECT ?::UUID AS run_id, * FROM planted_scores", [run.run_id])
    cursor.unregister("planted_scores")
    fold_heads(run.store.connection, run.run_id)
