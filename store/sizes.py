"""How many bytes a run will take on disk, table by table and site by site, before it is recorded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import ceil

from moescope.store.block_packing import BLOCK, GROUP_ROWS, table_blocks
from moescope.store.run_shapes import RunShape, VectorShape
from moescope.store.table_rows import FLOAT_BYTES, columns_of, rows_of
from moescope.store.writer import CHUNK_ROWS, CHUNK_VECTOR_BYTES

# Tables that a probe writes, by its name; whatever is recorded, `batches` is written too.
TABLES_OF: Mapping[str, tuple[str, ...]] = {
    "tokens": ("tokens", "sequences", "vocabulary"),
    "routing": ("routing", "loads", "load_partials"),
    "experts": ("experts", "expert_partials"),
    "residual": ("residual", "residual_sequences"),
    "router_logits": ("router_logits",),
    "expert_outputs": ("expert_outputs",),
    "attention": ("head_sequences", "heads"),
}
# DuckDB moves its log into the file beyond 16 MiB. Bytes of a row in the log: of each value as it is, and of what all rows
# have; the log of recordings holds 60 a row of `routing` or `residual` and 87 a token of the rest.
_LOG_LIMIT = 16 << 20
_LOGGED = {
    "tokens": 70,
    "sequences": 200,
    "vocabulary": 50,
    "load_partials": 80,
    "expert_partials": 130,
    "head_sequences": 90,
}
_LOGGED_ROW, _LOGGED_LIST_VALUE = 60, 5
# Blocks of a file besides those of tables that probes write: runs (two: what a run took is noted once its row lies in the
# file), layers, coverage, store_info, the directory, two indexes of runs. A further run adds to the first three alone.
_FIRST_BLOCKS, _FURTHER_BLOCKS, _HEADERS = 8, 4, 12_288
_DIRECTORY = 500  # blocks of data for each further block of the directory
_SHARD_HEADER = 350
_LONG_TEXT = 0.55  # of what texts take once there is more than a block of them, and DuckDB compresses them
_REPLACED = ("loads", "experts")  # written anew with each chunk


@dataclass(frozen=True)
class RunBytes:
    """Bytes of a run on disk.

    Attributes:
        rows: table → rows.
        tables: table → bytes of its blocks.
        vectors: site → bytes of its files beside the store.
        fixed: what a store holds besides.
        chunks: transactions in which it is written.
    """

    rows: Mapping[str, int]
    tables: Mapping[str, int]
    vectors: Mapping[str, int]
    fixed: int
    chunks: int

    @property
    def total(self) -> int:
        """All of it: of a new store that holds this run alone, or what the run adds to one; with its vectors."""
        return sum(self.tables.values()) + sum(self.vectors.values()) + self.fixed


def run_bytes(
    shape: RunShape, probes: Collection[str], floats: Mapping[str, float] = FLOAT_BYTES, *, first: bool = True
) -> RunBytes:
    """Bytes that a run of this shape takes when these probes record it.

    Args:
        shape: of the run.
        probes: names; vectors are counted for every site in `shape.vectors`.
        floats: bytes of a compressed value for columns of floats, where better known than on average.
        first: whether the store is new, or holds other runs.

    Example:
        >>> shape = RunShape(tokens=66_246, sequences=240, batches=30, longest=512, layers=6, d_model=256, vocabulary=4096)
        >>> run_bytes(shape, ["residual"]).tables["residual"] / 2**20
        7.25
    """
    names = [table for probe in probes for table in TABLES_OF.get(probe, ())] + ["batches"]
    rows = {table: rows_of(table, shape) for table in names}
    in_chunk = _batches_in_chunk(shape, rows)
    chunks = ceil(shape.batches / in_chunk)
    part = {table: ceil(count * in_chunk / max(1, shape.batches)) for table, count in rows.items()}
    logged = sum(_logged(table, count, shape) for table, count in part.items() if count < GROUP_ROWS)
    between = int(_LOG_LIMIT // max(1, logged)) + 1
    tables = {}
    for table, final in rows.items():
        count = _with_deleted(final, chunks) if table in _REPLACED else final
        if table in (*_REPLACED, "vocabulary"):  # nearly all of the vocabulary comes with the first texts
            part[table] = count
        columns = columns_of(table, shape, floats)
        if table == "sequences":
            columns[-1] *= _text_share(columns[-1], min(count, part[table] * between, GROUP_ROWS))
        blocks = table_blocks(count, columns, chunk_rows=part[table], chunks_between_checkpoints=between)
        alone = table == "batches" and count == 1  # a single row of numbers is kept in the directory
        tables[table] = 0 if alone else max(blocks, int(count > 0)) * BLOCK
    fixed = ((_FIRST_BLOCKS if first else _FURTHER_BLOCKS) + sum(tables.values()) // BLOCK // _DIRECTORY) * BLOCK
    fixed += _HEADERS if first else 0
    vectors = {vector.site: vector_bytes(vector, shape.sampled, chunks) for vector in shape.vectors}
    return RunBytes(rows, tables, vectors, fixed, chunks)


def vector_bytes(vector: VectorShape, sampled: int, shards: int) -> int:
    """Bytes of the files that hold one site's vectors of so many sampled tokens.

    Example:
        >>> vector_bytes(VectorShape("blocks.3.hook_resid_post", 512, 4), 1000, 1)
        2056350
    """
    row = vector.width * vector.itemsize + 8 + 4 * vector.with_experts
    return sampled * vector.per_token * row + (shards * _SHARD_HEADER if sampled else 0)


def _batches_in_chunk(shape: RunShape, rows: Mapping[str, int]) -> int:
    """Whole batches of a transaction: until a table has enough rows, vectors enough bytes, or half a minute is over."""
    batches = max(1, shape.batches)
    limits = [CHUNK_ROWS * batches / max(1, *rows.values())]
    if waiting := sum(vector_bytes(vector, shape.sampled, 0) for vector in shape.vectors):
        limits.append(CHUNK_VECTOR_BYTES * batches / waiting)
    if shape.batches_a_chunk is not None:
        limits.append(shape.batches_a_chunk)
    return max(1, min(batches, ceil(min(limits))))


def _logged(table: str, rows: int, shape: RunShape) -> float:
    lists = {
        "routing": sum(2 * r.top_k for r in shape.routers) / max(1, len(shape.routers)),
        "router_logits": sum(r.choices for r in shape.routers) / max(1, len(shape.routers)),
        "expert_outputs": sum(r.top_k for r in shape.routers) / max(1, len(shape.routers)),
        "head_sequences": sum(shape.heads) / max(1, len(shape.heads)),
    }
    text = shape.text_bytes / max(1, shape.sequences) if table == "sequences" else 0
    return rows * (_LOGGED.get(table, _LOGGED_ROW) + _LOGGED_LIST_VALUE * lists.get(table, 0) + text)


def _with_deleted(rows: int, chunks: int) -> int:
    """Rows that lie in the file where each chunk deletes them and writes them anew: a row group goes once none is left in it."""
    if rows >= GROUP_ROWS:
        return rows
    written = rows * chunks
    return written - (written - rows) // GROUP_ROWS * GROUP_ROWS


def _text_share(bytes_a_row: float, rows: int) -> float:
    size = bytes_a_row * rows
    return 1.0 if size <= BLOCK else max(BLOCK / size, _LONG_TEXT)
