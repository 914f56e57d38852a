"""How DuckDB lays the columns of a table into the blocks of its file, block by block.

A file is made of blocks of 256 KiB. A table is cut into row groups of at most 122,880 rows; each column of a row group is
compressed by itself, fills blocks, and its rest goes into a block that it shares with other rests of the same table, the one
that leaves the least room over. A rest over four fifths of a block has it alone. A block is never shared by two tables, so
the smallest table takes 256 KiB.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

BLOCK = 262_144
GROUP_ROWS = 122_880
# What a block holds besides its checksum, and the share of it from which on a rest is given no company.
_ROOM = BLOCK - 8
_ALONE = 0.8


def row_groups(rows: int) -> list[int]:
    """Rows of each row group when so many are written at once.

    Example:
        >>> row_groups(250_000)
        [122880, 122880, 4240]
    """
    full, rest = divmod(rows, GROUP_ROWS)
    return [GROUP_ROWS] * full + [rest] * (rest > 0)


def packed(groups: Iterable[Sequence[float]]) -> int:
    """Blocks that row groups take which are written together.

    Args:
        groups: for each row group the bytes of each of its columns, compressed.

    Example:
        >>> packed([[300_000.0, 100_000.0, 90_000.0]])  # one full block; 37,864, 100,000 and 90,000 bytes share another
        2
    """
    blocks = 0
    free: list[float] = []
    for columns in groups:
        for size in columns:
            full, rest = divmod(size, _ROOM)
            blocks += int(full)
            if rest < 1:
                continue
            if rest > _ALONE * _ROOM:
                blocks += 1
                continue
            place = bisect_left(free, rest)
            if place < len(free):
                left = free.pop(place) - rest
            else:
                blocks, left = blocks + 1, _ROOM - rest
            if left >= (1 - _ALONE) * _ROOM:
                insort(free, left)
    return blocks


def table_blocks(rows: int, columns: Sequence[float], *, chunk_rows: int, chunks_between_checkpoints: int) -> int:
    """Blocks of a table that is written a chunk at a time.

    A chunk of a row group or more goes to the file as it is committed, in row groups of its own. Smaller ones wait in the log
    and are written together at the next checkpoint.

    Args:
        rows: of the whole run.
        columns: bytes a row of each column, compressed.
        chunk_rows: rows of this table in one transaction.
        chunks_between_checkpoints: how many transactions the log holds before its contents move into the file.
    """
    at_once = chunk_rows if chunk_rows >= GROUP_ROWS else chunk_rows * chunks_between_checkpoints
    times, rest = divmod(rows, max(1, at_once))
    whole = packed(_sizes(at_once, columns)) if times else 0
    return times * whole + (packed(_sizes(rest, columns)) if rest else 0)


def _sizes(rows: int, columns: Sequence[float]) -> list[list[float]]:
    return [[group * bytes_a_row for bytes_a_row in columns] for group in row_groups(rows)]
