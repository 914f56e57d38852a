"""Parquet, CSV and NumPy files that are well formed and hold other columns, types and shapes than they should."""

from __future__ import annotations

import contextlib
import csv
import datetime
import decimal
import io
import random
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hostile_trees import HOSTILE

_NOT_UTF8 = pa.array([b"caf\xe9\xff"]).cast(pa.binary())
# One value of each kind; repeated to the length of the table.
_CELLS: tuple[Callable[[], pa.Array], ...] = (
    lambda: pa.array([None]), lambda: pa.array([-1]), lambda: pa.array([2**63 - 1]), lambda: pa.array([2**64 - 1], pa.uint64()),
    lambda: pa.array([float("nan")]), lambda: pa.array([float("inf")]), lambda: pa.array(["x"]), lambda: pa.array([True]),
    lambda: _NOT_UTF8, lambda: pa.Array.from_buffers(pa.string(), 1, _NOT_UTF8.buffers()),
    lambda: pa.array([datetime.datetime(1, 1, 1)], pa.timestamp("us")),
    lambda: pa.array([2**62], pa.int64()).cast(pa.timestamp("us")),
    lambda: pa.array([2**62]).cast(pa.duration("s")), lambda: pa.array([decimal.Decimal(10) ** 37]),
    lambda: pa.array([{"a": 1}]), lambda: pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
    lambda: pa.array([["x"]]), lambda: pa.array([[1.5, None]]), lambda: pa.array([[]], pa.list_(pa.int64())),
    lambda: pa.array([[-1, 70_000]]), lambda: pa.array([[2**62]]), lambda: pa.array([[[1]]]), lambda: pa.array(["y"]).dictionary_encode(),
    lambda: pa.array([[1, 2]], pa.list_(pa.int64(), 2)), lambda: pa.array([np.float16(1)], pa.float16()),
    lambda: pa.array([[float("nan"), float("inf")]]), lambda: pa.array([[1e308, -1e308]]), lambda: pa.array(["\x00"]),
    lambda: pa.array([3], pa.int32()).cast(pa.date32()), lambda: pa.array([0.5]), lambda: pa.array([[0, 0]]),
    lambda: pa.array(["x" * 50_000]),
)  # fmt: skip


def hostile_table(table: pa.Table, dice: random.Random) -> pa.Table:
    """A copy with one to three columns or rows changed."""
    for _ in range(dice.choice((1, 1, 2, 3))):
        rows, number = len(table), dice.randrange(max(table.num_columns, 1))
        kind = dice.random()
        if table.num_columns == 0:
            return table
        if kind < 0.6:
            cell = dice.choice(_CELLS)()
            column: Any = pa.concat_arrays([cell] * rows) if rows else cell.slice(0, 0)
            old = table.column(number).combine_chunks()
            if dice.random() < 0.4 and rows > 1 and old.type == column.type:
                column = pa.concat_arrays([old.slice(0, rows - 1), column.slice(0, 1)])
            table = table.set_column(number, table.column_names[number], column)
        elif kind < 0.7:
            table = table.remove_column(number)
        elif kind < 0.8:
            name = dice.choice(
                ("text", "experts", "token_ids", "x", "", "a\x00b", '"', "run_id", "file_row_number", "filename")
            )
            table = table.append_column(name, pa.array(range(rows)))
        elif kind < 0.9:
            table = table.slice(0, dice.choice((0, 1, rows)))
        else:
            table = pa.concat_tables([table, table.slice(0, 3)])
    return table


def as_parquet(table: pa.Table, dice: random.Random) -> bytes:
    """The file, compressed in one of several ways."""
    out = io.BytesIO()
    compression = dice.choice(("none", "snappy", "zstd", "gzip", "brotli", "lz4"))
    pq.write_table(table, out, compression=compression, row_group_size=dice.choice((3, 1000)))
    return out.getvalue()


def hostile_csv(rows: list[list[str]], dice: random.Random) -> bytes:
    """Lines of cells, some of them changed; the first line is the header."""
    rows = [list(row) for row in rows]
    for _ in range(dice.choice((1, 1, 2, 5))):
        line = dice.choice(rows)
        place = dice.randrange(len(line)) if line else 0
        kind = dice.random()
        if kind < 0.5 and line:
            line[place] = _cell(dice)
        elif kind < 0.65:
            line.insert(place, _cell(dice))
        elif kind < 0.8 and line:
            del line[place]
        elif kind < 0.9:
            rows.insert(dice.randrange(len(rows) + 1), list(line))
        else:
            rows = rows[: dice.randrange(len(rows) + 1)] or [[]]
    out = io.StringIO(newline="")
    quoting = dice.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONE))
    writer = csv.writer(
        out,
        delimiter=dice.choice(",,,;\t"),
        quoting=quoting,
        escapechar="\\",
        lineterminator=dice.choice(("\n", "\r\n", "\r")),
    )
    for row in rows:
        with contextlib.suppress(csv.Error):  # one empty field without quotes, which this writer cannot tell
            writer.writerow(row)
    return out.getvalue().encode("utf-8", "surrogatepass") + dice.choice((b"", b"", b'"open'))


def _cell(dice: random.Random) -> str:
    value = dice.choice(HOSTILE)()
    text = (
        value
        if isinstance(value, str)
        else f"{value:.3g}"
        if isinstance(value, float)
        else repr(value)
        if abs_small(value)
        else "1e400"
    )
    return dice.choice(
        (text, text, "\x00", "'", '"', "[1, 2]", "[1, x]", "[", "NULL", "# comment", "1e5", "0x10", "1_0")
    )


def abs_small(value: Any) -> bool:
    """Whether a value may be written out: not an integer that Python refuses to print."""
    return not isinstance(value, int) or abs(value) < 10**300


def hostile_arrays(arrays: dict[str, np.ndarray[Any, Any]], dice: random.Random) -> dict[str, np.ndarray[Any, Any]]:
    """Arrays by name, one or two of them of another type, shape or value, gone or doubled."""
    arrays = dict(arrays)
    for _ in range(dice.choice((1, 1, 2))):
        if not arrays:
            return arrays
        name = dice.choice(sorted(arrays))
        array = arrays[name]
        kind = dice.randrange(9) if array.ndim else 6  # of a single number only its loss is left
        if kind == 0:
            asked = dice.choice(("f4", "i1", "u8", "U5", "S3", "c8", "M8[s]", "m8[D]", "b1", "f2"))
            with contextlib.suppress(TypeError):  # an array of records becomes no other
                arrays[name] = array.astype(asked)
        elif kind == 1:
            arrays[name] = array[None]
        elif kind == 2:
            arrays[name] = array.reshape(-1)
        elif kind == 3:
            arrays[name] = array[: dice.choice((0, 1, -1))]
        elif kind == 4:
            arrays[name] = np.full(array.shape, dice.choice((-1, 0, 70_000, 2**62)))
        elif kind == 5:
            arrays[name] = np.full(array.shape, dice.choice((np.nan, np.inf, -np.inf, 1e300, 0.0)))
        elif kind == 6:
            del arrays[name]
        elif kind == 7:
            arrays[dice.choice(("x", "experts", "router_logits", "layer_1", "attention_mask", "input_ids"))] = array
        else:
            arrays[name] = (
                np.zeros(array.shape, [("a", "i4"), ("b", "f4")])
                if dice.random() < 0.5
                else np.array(dice.choice((5, "x")))
            )
    return arrays


def as_npz(arrays: dict[str, np.ndarray[Any, Any]], dice: random.Random) -> bytes:
    """The archive; now and then with a member that claims to be far larger than it is, or that unpacks to far more."""
    out = io.BytesIO()
    np.savez_compressed(out, **arrays) if dice.random() < 0.5 else np.savez(out, **arrays)  # type: ignore[arg-type]  # names
    if dice.random() < 0.15:
        with zipfile.ZipFile(out, "a", zipfile.ZIP_DEFLATED) as archive:
            name = dice.choice((*arrays, "extra", "experts", "router_logits")) + dice.choice((".npy", ""))
            if dice.random() < 0.5:
                archive.writestr(name, claiming("<f4", (10 ** dice.choice((9, 11, 13)), 4)) + b"\0" * 64)
            else:
                archive.writestr(name, claiming("<i8", (64 << 17,)) + bytes(64 << 20))
    return out.getvalue()


def as_npy(array: np.ndarray[Any, Any], dice: random.Random) -> bytes:
    """The file; now and then with a header that claims far more numbers than there are."""
    if dice.random() < 0.15:
        return claiming(dice.choice(("<f4", "<i8", "|O", "<U9", "bad")), (10**11, 8, 4)[: dice.randint(0, 3)]) + bytes(
            100
        )
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def claiming(kind: str, shape: tuple[int, ...]) -> bytes:
    """A header of an .npy file."""
    text = repr({"descr": kind, "fortran_order": False, "shape": shape}).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
