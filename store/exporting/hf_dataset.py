"""A Hugging Face dataset on disk: the decisions with their tokens' text, one row a (sequence, position, layer).

Written without the datasets library, piece by piece: Arrow streams, and the two JSON files that `load_from_disk` reads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from moescope.core.errors import InputError
from moescope.store.exporting.tables import decisions
from moescope.store.run import Run

_SHARD_BYTES = 500_000_000
_ROWS_A_BATCH = 65_536


def write_hf_dataset(run: Run, folder: Path, tables: Sequence[str], tell: Callable[[str], None]) -> None:
    """Write the decisions so that `datasets.load_from_disk(folder)` gives them.

    Raises:
        InputError: the run has no decisions, or other tables were asked for.
    """
    if "routing" not in tables:
        raise InputError(f"run {run.name!r} has no decisions", fix="export its tables as parquet or csv")
    tell("routing")
    reader = decisions(run).to_arrow_reader(_ROWS_A_BATCH)
    written = list(_shards(reader, folder))
    names = [f"data-{number:05d}-of-{len(written):05d}.arrow" for number in range(len(written))]
    for path, name in zip(written, names, strict=True):
        path.rename(folder / name)
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": hashlib.sha256(run.run_id.encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    info = {"citation": "", "description": f"Routing decisions of {run.model}", "homepage": "", "license": ""}
    (folder / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=1), encoding="utf-8")


def _shards(reader: pa.RecordBatchReader, folder: Path) -> Iterator[Path]:
    """Arrow streams of about `_SHARD_BYTES` each, at least one."""
    batch = next(reader, None)
    number = 0
    while batch is not None or number == 0:
        path = folder / f"shard-{number}.arrow"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, reader.schema) as stream:
            while batch is not None and file.tell() < _SHARD_BYTES:
                stream.write_batch(batch)
                batch = next(reader, None)
        yield path
        number += 1
