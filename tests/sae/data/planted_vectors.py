"""Runs with vectors written by hand: every vector says of which token it is."""

from __future__ import annotations

from typing import Any

import numpy as np

from moescope.store.vector_shards import VectorRows, write_shards

_CATALOGUE = ("site", "shard", "path", "rows", "width", "dtype", "tokens", "checksum")


def plant_vectors(
    store: Any,
    run: Any,
    site: str,
    vectors: Any,
    *,
    token: Any | None = None,
    expert: Any | None = None,
    dtype: str = "float32",
    shards: int = 3,
) -> None:
    """Write vectors as the shards of a site and enter them in the catalogue; `vectors` as their bits for bfloat16."""
    token = np.arange(len(vectors)) if token is None else np.asarray(token)
    counts: dict[str, int] = {}
    for part in np.array_split(np.arange(len(vectors)), shards):
        of_experts = None if expert is None else np.asarray(expert, np.int32)[part]
        rows = VectorRows(site, dtype, np.asarray(vectors)[part], token[part].astype(np.int64), of_experts, len(part))
        catalogue = write_shards(store.path, run.run_id, [rows], counts)
        for row in catalogue.to_pylist():  # type: ignore[union-attr]  # there are rows
            store.connection.execute(
                "INSERT INTO activations (run_id, site, shard, path, rows, width, dtype, tokens, checksum) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [run.run_id, *(row[name] for name in _CATALOGUE)],
            )


def plant_run(store: Any, *, documents: int, length: int, name: str = "planted", special: bool = False) -> Any:
    """A run of documents of one length: tokens, sequences and nothing else; its first tokens are special on request."""
    run = store.begin_run(name=name, model="planted", architecture="None")
    store.connection.execute(
        """
        INSERT INTO sequences (run_id, sequence_id, document_id, part, n_tokens, content_hash)
        SELECT $run, n, n, 0, $length, 'x'
        FROM range($documents) AS t(n)
        """,
        {"run": run.run_id, "documents": documents, "length": length},
    )
    store.connection.execute(
        """
        INSERT INTO tokens (run_id, token, sequence_id, position, token_id, phase, is_special)
        SELECT $run, n, n // $length, n % $length, n % 7, 'prefill', $special AND n % $length = 0
        FROM range($documents * $length) AS t(n)
        """,
        {"run": run.run_id, "documents": documents, "length": length, "special": special},
    )
    return run
