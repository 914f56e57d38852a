"""How much room each run takes, estimated from the file's own bookkeeping."""

from __future__ import annotations

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
        table_bytes: its part of the blocks of each table, by rows: an estimate, for rows differ in width.
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

    The blocks in use are shared out among the tables by the blocks that their columns lie in (several may lie in one), and
    among the runs of a table by their rows.
    """
    rows: dict[str, dict[str, int]] = {}
    blocks: dict[str, float] = {}
    for table in TABLES:
        if "run_id" not in {column.name for column in table.columns}:
            continue
        query = f'SELECT run_id::VARCHAR, count(*) FROM "{table.name}" GROUP BY run_id'
        if counted := dict(store.fetch(query)):
            rows[table.name] = counted
            blocks[table.name] = _blocks(store, table.name)
    used = store.fetch("SELECT used_blocks * block_size FROM pragma_database_size()")[0][0]
    share = used / max(1.0, sum(blocks.values()))
    sizes = {}
    for run in store.runs():
        own = {table: counted.get(run.run_id, 0) for table, counted in rows.items()}
        part = sum(blocks[table] * count / sum(rows[table].values()) for table, count in own.items())
        sizes[run.run_id] = RunSize(sum(own.values()), int(part * share), _vector_bytes(store, run.run_id))
    return sizes


def _blocks(store: Store, table: str) -> float:
    query = """
        SELECT count(DISTINCT block)
        FROM (
            SELECT unnest(list_append(additional_block_ids, block_id)) AS block
            FROM pragma_storage_info($table)
            WHERE persistent
        )
    """
    return float(store.fetch(query, {"table": table})[0][0])


def _vector_bytes(store: Store, run_id: str) -> int:
    folder = vectors_folder(store.path, run_id)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
