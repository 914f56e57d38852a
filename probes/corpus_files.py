"""Readers of corpus files: one function a format, each a stream of records."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PIECE = 1_000_000


@dataclass(frozen=True)
class Record:
    """Fields of one record and where it stands, for messages."""

    where: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used: where it stands and what is wrong, as the end of a sentence."""

    where: str
    problem: str


def read_jsonl(path: Path) -> Iterator[Record | BadRecord]:
    """One JSON object a line; empty lines are passed over."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                fields = json.loads(line) if line else None
            except UnicodeDecodeError as wrong:
                yield BadRecord(where, f"is not UTF-8 (byte {wrong.start} of the line)")
            except (ValueError, RecursionError) as wrong:
                yield BadRecord(where, f"is not JSON ({wrong})")
            else:
                if isinstance(fields, dict):
                    yield Record(where, fields)
                elif line:
                    yield BadRecord(where, f"is a JSON {type(fields).__name__}, not an object")


def read_csv(path: Path) -> Iterator[Record | BadRecord]:
    """Rows under a header line."""
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row:
                    yield BadRecord(where, "has more fields than the header")
                elif any(value and not value.isascii() and _has_surrogate(value) for value in row.values()):
                    yield BadRecord(where, "is not UTF-8")
                else:
                    yield Record(where, row)
        except csv.Error as wrong:
            yield BadRecord(f"{path}, line {reader.line_num}", f"is not CSV ({wrong})")


def read_parquet(path: Path) -> Iterator[Record | BadRecord]:
    """Rows of a Parquet file, a few thousand at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            row = 0
            for batch in file.iter_batches(batch_size=2048):
                for made in _rows(batch):
                    where = f"{path}, row {row}"
                    yield BadRecord(where, made) if isinstance(made, str) else Record(where, made)
                    row += 1
    except pa.ArrowException as wrong:
        yield BadRecord(str(path), f"is not a readable Parquet file ({wrong})")


def read_txt(path: Path) -> Iterator[Record | BadRecord]:
    """The whole file as one document; a file of over a million characters in pieces that end at a line's end."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        piece = 0
        try:
            while text := file.read(_PIECE):
                text += file.readline() if len(text) == _PIECE else ""
                yield Record(f"{path}, piece {piece}" if piece else str(path), {"text": text})
                piece += 1
        except UnicodeDecodeError as wrong:
            yield BadRecord(str(path), f"is not UTF-8 ({wrong.reason} near byte {wrong.start}); convert it first")


def _rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """Rows of an Arrow batch as Python values; of a row that Python cannot hold, what is wrong with it."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):
        for place in range(batch.num_rows):
            try:
                yield batch.slice(place, 1).to_pylist()[0]
            except (ValueError, OverflowError) as wrong:
                yield f"holds a value that cannot be read ({wrong})"


READERS: Mapping[str, Callable[[Path], Iterator[Record | BadRecord]]] = {
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_txt,
}


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)
