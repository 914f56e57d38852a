"""The neutral form of a routing trace: one row a (sequence_id, position, layer), whatever program wrote it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

# Column → (DuckDB type, whether a trace must have it, what it is). The documentation's table is compared with this one.
COLUMNS: dict[str, tuple[str, bool, str]] = {
    "sequence_id": ("BIGINT", True, "0-based number of the sequence"),
    "position": ("INTEGER", True, "0-based place of the token in its sequence"),
    "layer": ("USMALLINT", True, "0-based index of the transformer block"),
    "experts": ("BIGINT[]", True, "ids of the chosen experts; a row with an id below 0 was not recorded"),
    "weights": ("FLOAT[]", False, "weights given to the experts, in the order of experts"),
    "block": ("VARCHAR", False, "sublayer holding the router: mlp (where the column is missing), attn, mlp.1, …"),
    "label": ("VARCHAR", False, "label of the sequence"),
    "phase": ("VARCHAR", False, "prefill (where the column is missing) or decode"),
    "token_id": ("INTEGER", False, "id of the token in the tokenizer's vocabulary"),
    "text": ("VARCHAR", False, "text of the token"),
    "document_id": ("BIGINT", False, "document the sequence is a part of; the sequence itself where missing"),
    "margin": ("FLOAT", False, "k-th minus (k+1)-th score"),
    "entropy": ("FLOAT", False, "entropy of the router's distribution over all experts, nats"),
    "logits": ("FLOAT[]", False, "router scores before softmax, by expert id"),
}
REQUIRED = tuple(name for name, (_, required, _) in COLUMNS.items() if required)


@dataclass
class Trace:
    """What a reader makes of a file.

    Attributes:
        format: name of the format.
        decisions: rows in the neutral form: a relation, or tables one after the other; None where the file only counts.
        counts: instead of decisions: a table of layer, expert, tokens.
        n_experts, top_k, n_null, model: what the file says of its model, None where it says nothing.
        layers, sequences: rows of these tables of the store, where the file has them.
        expected_tokens: tokens that the file speaks of, where not all of them have a decision that can be placed.
        notes: what the file lacks or what was made of it, one sentence each; kept in the run's summary.
    """

    format: str
    decisions: duckdb.DuckDBPyRelation | Iterable[pa.Table] | None = None
    counts: pa.Table | None = None
    n_experts: int | None = None
    top_k: int | None = None
    n_null: int | None = None
    model: str | None = None
    layers: pa.Table | None = None
    sequences: duckdb.DuckDBPyRelation | None = None
    expected_tokens: int | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Options:
    """What the caller says of a trace because its file does not.

    Attributes:
        n_experts, top_k, n_null: of the model.
        layers: layer of each place along an array's layer axis; None for 0, 1, 2, ….
        probabilities: router scores are probabilities already, not logits.
        normalize: the weights of the chosen experts are scaled to sum to 1.
    """

    n_experts: int | None = None
    top_k: int | None = None
    n_null: int | None = None
    layers: Sequence[int] | None = None
    probabilities: bool = False
    normalize: bool = False


def list_column(values: NDArray[Any], kind: pa.DataType) -> pa.Array:
    """[row, k] as an Arrow column of lists."""
    rows, width = values.shape
    offsets = pa.array(np.arange(0, rows * width + 1, width) if width else np.zeros(rows + 1), pa.int64())
    return pa.LargeListArray.from_arrays(offsets, pa.array(np.ascontiguousarray(values).ravel(), kind))


def decision_table(
    sequence: int | NDArray[Any],
    positions: NDArray[Any],
    layer: int,
    experts: NDArray[Any],
    **optional: NDArray[Any] | Sequence[Any] | str | None,
) -> pa.Table:
    """Rows of one layer in the neutral form.

    Args:
        sequence: sequence_id, of all rows or [row].
        positions: [row].
        layer: of all rows.
        experts: [row, k].
        optional: other columns of the neutral form: [row], or [row, k], or one text for all rows; None leaves it out.
    """
    rows = len(positions)
    columns: dict[str, pa.Array] = {
        "sequence_id": pa.array(np.broadcast_to(np.asarray(sequence, np.int64), rows)),
        "position": pa.array(np.asarray(positions, np.int64)),
        "layer": pa.array(np.full(rows, layer, np.int64)),
        "experts": list_column(experts, pa.int64()),
    }
    for name, values in optional.items():
        if isinstance(values, str):
            columns[name] = pa.array([values]).take(pa.array(np.zeros(rows, np.int64)))
        elif isinstance(values, np.ndarray) and values.ndim == 2:
            columns[name] = list_column(values, pa.float32())
        elif values is not None:
            columns[name] = pa.array(values)
    return pa.table(columns)
