"""Runs whose vectors are planted: rows of `runs`, `sequences` and `tokens` by plain SQL, and shards beside the store."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

LENGTH = 50


@pytest.fixture
def plant_run(store: Any) -> Callable[..., Any]:
    """`plant_run({site: array}, name="run", shards=3)`: a run with these vectors [token, …], 50 tokens a document."""
    from moescope.store.vector_shards import VectorRows, write_shards

    def plant(vectors: Mapping[str, Any], *, name: str = "run", shards: int = 3, model: str = "planted") -> Any:
        run_id, count = str(uuid.uuid4()), len(next(iter(vectors.values())))
        connection = store.connection
        connection.execute(
            "INSERT INTO runs (run_id, name, model, revision, settings, status, anatomy, corpus_fingerprint, seed, versions) "
            """VALUES (?, ?, ?, 'weights', '{"max_length": 50, "corpus": "planted"}', 'complete', '{"d_model": 16}', 'abc', 0, '{}')""",
            [run_id, name, model],
        )
        connection.execute(
            "INSERT INTO sequences (run_id, sequence_id, document_id, part, n_tokens) "
            "SELECT ?, i, i, 0, ? FROM range(?) r(i)",
            [run_id, LENGTH, -(-count // LENGTH)],
        )
        connection.execute(
            "INSERT INTO tokens (run_id, token, sequence_id, position, token_id, phase) "
            "SELECT ?, i, i // ?, i % ?, 0, 'prefill' FROM range(?) r(i)",
            [run_id, LENGTH, LENGTH, count],
        )
        counts: dict[str, int] = {}
        for part in np.array_split(np.arange(count), shards):
            rows = [
                VectorRows(site, "float32", np.asarray(x, np.float32)[part], part, None, len(part))
                for site, x in vectors.items()
            ]
            catalogue = write_shards(store.path, run_id, rows, counts)
            connection.register("planted_rows", catalogue)
            connection.execute(
                "INSERT INTO activations BY NAME SELECT ?::UUID AS run_id, * FROM planted_rows", [run_id]
            )
            connection.unregister("planted_rows")
        return store.run(name)

    return plant


@pytest.fixture
def sparse_vectors() -> Callable[..., Any]:
    """`sparse_vectors(count, width=16, seed=0)`: sums of few of 24 directions, far from 0."""

    def draw(count: int, width: int = 16, seed: int = 0) -> Any:
        random = np.random.default_rng(seed)
        directions = np.random.default_rng(7).normal(size=(24, width))
        active = (random.random((count, 24)) < 0.1) * random.uniform(1, 3, (count, 24))
        return (active @ directions + 5).astype(np.float32)

    return draw
