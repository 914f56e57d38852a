"""Bytes of a value in each column of real recordings, from which the size formulas take their constants.

    .venv/bin/python benchmarks/store_sizes.py [--model demo olmoe-shaped PATH_OR_ID …] [--data demo] [--sequences 64]

Two tables. The first: each column of every recording, with the bytes of one value as DuckDB stores it (for columns of lists,
of one element) and the compression chosen. A piece of a column that fills its block is counted with the whole block, any
other up to where the next piece in its block begins; the last piece of a block, of which the file does not tell the end, is
left out. The columns of floats are the constants of `moescope/store/table_rows.py`. The second: bytes by the formulas beside
bytes of the file.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from models import olmoe_shaped, random_corpus

import moescope as ms
from moescope.probes.planning import plan
from moescope.store.block_packing import BLOCK
from moescope.store.measured_bytes import bytes_in_use
from moescope.store.table_rows import FLOAT_BYTES

_PIECES = """
    SELECT column_name, column_path, row_group_id, segment_id, compression, count, block_id, block_offset
    FROM pragma_storage_info($table)
    WHERE persistent AND segment_type <> 'VALIDITY'
    ORDER BY row_group_id, column_path, segment_id
"""
_PROBES = ("routing", "experts", "residual", "router_logits", "expert_outputs")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", nargs="+", default=["demo", "olmoe-shaped"])
    options.add_argument("--data", default="demo")
    options.add_argument(
        "--sequences", type=int, default=64, help="of the random corpus, and of --data for other models"
    )
    given = options.parse_args()
    found: dict[str, dict[str, tuple[float, str]]] = {}
    for name in given.model:
        print(f"recording {name} …", flush=True)
        found[name] = _recorded(name, given)
    print(f"\n{'column':<40}" + "".join(f"{name[-24:]:>26}" for name in found))
    for column in dict.fromkeys(column for columns in found.values() for column in columns):
        cells = [f"{_told(columns.get(column)):>26}" for columns in found.values()]
        print(f"{column:<40}" + "".join(cells))
    print(f"\n{'floats':<40}{'mean':>10}{'in the formulas':>18}")
    for column, constant in FLOAT_BYTES.items():
        values = [columns[column][0] for columns in found.values() if column in columns]
        print(f"{column:<40}{statistics.mean(values) if values else float('nan'):>10.2f}{constant:>18.2f}")


def _recorded(name: str, given: argparse.Namespace) -> dict[str, tuple[float, str]]:
    model, corpus = _loaded(name, given)
    probes = _PROBES if model.anatomy.moe else ("residual",)
    options: dict[str, Any] = {"probes": probes, "progress": False}
    planned = plan(model, corpus, **options)
    with tempfile.TemporaryDirectory() as folder, ms.Store(Path(folder) / "runs.duckdb") as store:
        run = ms.record(model, corpus, store, name="sizes", **options)
        used = bytes_in_use(store)
        total = store.path.stat().st_size
        print(f"  {run!r}")
        print(
            f"  bytes by the formulas {planned.bytes:,}; in use {used:,} ({planned.bytes / used - 1:+.1%}); "
            f"file {total:,} ({planned.bytes / total - 1:+.1%})"
        )
        found: dict[str, tuple[float, str]] = {}
        for (table,) in store.fetch("SELECT table_name FROM duckdb_tables() ORDER BY table_name"):
            found |= _columns(store, table)
        return found


def _loaded(name: str, given: argparse.Namespace) -> tuple[Any, Any]:
    if name == "olmoe-shaped":
        model = ms.load(olmoe_shaped(torch.float32))
        return model, random_corpus(model.anatomy.vocabulary, given.sequences, 256)
    corpus = ms.Corpus.load(given.data)
    return ms.load(name), corpus if name == "demo" else [d.text for d in corpus][: given.sequences]


def _columns(store: ms.Store, table: str) -> dict[str, tuple[float, str]]:
    """Column → bytes of a value, and how it is compressed."""
    pieces = store.fetch(_PIECES, {"table": table})
    starts: dict[int, list[int]] = defaultdict(list)
    last: dict[tuple[str, int], int] = {}
    for _, path, group, number, _, _, block, start in pieces:
        starts[block].append(start)
        last[path, group] = max(number, last.get((path, group), 0))
    size: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    ways: dict[str, set[str]] = defaultdict(set)
    for name, path, group, number, way, count, block, start in pieces:
        column = f"{table}.{name}" + (".offsets" if path.count(",") == 0 and _is_list(pieces, name) else "")
        ways[column].add(way)
        ends = [end for end in starts[block] if end > start]
        if block < 0:
            taken = 0  # the same value everywhere: kept in the directory alone
        elif number < last[path, group]:
            taken = BLOCK
        elif ends:
            taken = min(ends) - start
        else:
            continue
        size[column][0] += taken
        size[column][1] += count
    return {c: (taken / count, "/".join(sorted(ways[c]))) for c, (taken, count) in size.items() if count}


def _told(found: tuple[float, str] | None) -> str:
    return "—" if found is None else f"{found[0]:.3f} {found[1]}"


def _is_list(pieces: list[tuple[Any, ...]], name: str) -> bool:
    return any(piece[0] == name and "," in piece[1] for piece in pieces)


if __name__ == "__main__":
    main()
