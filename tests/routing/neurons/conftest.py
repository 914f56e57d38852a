"""Vectors beside planted runs, written as a recording writes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moescope.store.run import Run
from moescope.store.vector_shards import VectorRows, write_shards


@pytest.fixture(scope="session")
def keep_vectors() -> Callable[..., None]:
    """`keep_vectors(run, site, vectors, token=…, expert=…, shards=…)` adds shards of vectors to a planted run."""

    def keep(
        run: Run,
        site: str,
        vectors: Any,
        *,
        token: Any = None,
        expert: Any = None,
        dtype: str = "float32",
        shards: int = 1,
    ) -> None:
        values = np.asarray(vectors)
        token = np.arange(len(values)) if token is None else np.asarray(token)
        counts: dict[str, int] = {}
        for part in np.array_split(np.arange(len(values)), shards):
            rows = VectorRows(
                site,
                dtype,
                values[part].astype("<u2" if dtype == "bfloat16" else "<f4"),
                token[part].astype("<i8"),
                None if expert is None else np.asarray(expert)[part].astype("<i4"),
                len(np.unique(token[part])),
            )
            table = write_shards(run.store.path, run.run_id, [rows], counts)
            cursor = run.store.cursor()
            cursor.register("kept", table)
            cursor.execute("INSERT INTO activations BY NAME SELECT ?::UUID AS run_id, * FROM kept", [run.run_id])
            cursor.unregister("kept")

    return keep
