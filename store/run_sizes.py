"""How much room each run takes, estimated from the file's own bookkeeping."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moescope.store.schema import TABLES
from moescope.store.vector_shards import vectors_folder

if TYPE_CHECKING:
    from moescope.store.store import Store


@dataclass(frozen=True)
class RunSize:
    """Room that a run takes.

    Attributes:
        rows: rows in all tables.
        table_bytes: its part of the blocks of the file, by rows: an estimate, for rows differ in width.
        vector_bytes: the files of vectors beside the store.
    """

    rows: int
    table_bytes: int
    vector_bytes: int

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.table_bytes + self.vector_bytes


def run_sizes(store: Store) -> dict[str, RunSize]:
    """Room of each run of `store`, by run_id.

    The bytes of a block go to the tables that have columns in it, and those of a table to its runs, each by rows. Blocks of no
    column, most of them long texts, go to the runs by tokens of their texts.
    """
    rows = {}
    for table in TABLES:
        if "run_id" in {column.name for column in table.columns}:
            query = f'SELECT run_id::VARCHAR, count(*) FROM "{table.name}" GROUP BY run_id'
            rows[table.name] = dict(store.fetch(query))
    room = _table_bytes(store, [table for table, counted in rows.items() if counted])
    used = store.fetch("SELECT used_blocks * block_size FROM pragma_database_size()")[0][0]
    other = max(0.0, used - sum(room.values()))
    text = dict(store.fetch("SELECT run_id::VARCHAR, sum(n_tokens)::BIGINT FROM sequences GROUP BY run_id"))
    texts = sum(n or 0 for n in text.values())
    sizes = {}
    for run in store.runs():
        own = {table: counted[run.run_id] for table, counted in rows.items() if run.run_id in counted}
        part = sum(room.get(table, 0.0) * count / sum(rows[table].values()) for table, count in own.items())
        part += other * (text.get(run.run_id) or 0) / max(1, texts)
        sizes[run.run_id] = RunSize(sum(own.values()), int(part), _vector_bytes(store, run.run_id))
    return sizes


def _table_bytes(store: Store, tables: Sequence[str]) -> dict[str, float]:
    query = """
        SELECT block, sum(count)
        FROM (
            SELECT unnest(list_append(additional_block_ids, block_id)) AS block, count
            FROM pragma_storage_info($table)
            WHERE persistent
        )
        WHERE block >= 0
        GROUP BY block
    """
    weight = {table: {block: float(n) for block, n in store.fetch(query, {"table": table})} for table in tables}
    whole: defaultdict[int, float] = defaultdict(float)
    for blocks in weight.values():
        for block, n in blocks.items():
            whole[block] += n
    size = store.fetch("SELECT block_size FROM pragma_database_size()")[0][0]
    return {table: size * sum(n / whole[b] for b, n in blocks.items() if n) for table, blocks in weight.items()}


def _vector_bytes(store: Store, run_id: str) -> int:
    folder = vectors_folder(store.path, run_id)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
