"""Vectors beside a store: safetensors files, written whole, summed up by SHA-256, and catalogued in `activations`.

A shard holds `vectors` [row, …] and `token` [row], and at sites inside experts `expert` [row], the id of the slot's expert.
No library of tensors takes part: bfloat16, which NumPy does not have, is carried as its bits.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.atomic import written_whole

# Type of a vector's components → its name in a safetensors file, and the NumPy type that carries it.
DTYPES: Mapping[str, tuple[str, str]] = {
    "float64": ("F64", "<f8"),
    "float32": ("F32", "<f4"),
    "float16": ("F16", "<f2"),
    "bfloat16": ("BF16", "<u2"),
}
_INTEGERS = {"<i8": "I64", "<i4": "I32"}


@dataclass(frozen=True)
class VectorRows:
    """Vectors read at one site in one forward pass.

    Attributes:
        site: its name.
        dtype: type of the components; a key of `DTYPES`.
        vectors: [row, …]; bfloat16 as its bits in uint16.
        token: run-wide number of each row's token.
        expert: id of each row's expert, None where the site is not inside experts.
        tokens: how many sampled tokens the rows belong to; rows may be more (slots), or fewer (null experts have no neurons).
    """

    site: str
    dtype: str
    vectors: NDArray[Any]
    token: NDArray[np.int64]
    expert: NDArray[np.int32] | None
    tokens: int

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.vectors.nbytes + self.token.nbytes + (0 if self.expert is None else self.expert.nbytes)


def vectors_folder(store: Path, run_id: str) -> Path:
    """Where the vectors of a run lie: beside the store, named after it.

    Example:
        >>> vectors_folder(Path("data/runs.duckdb"), "1b2c").as_posix()
        'data/runs.vectors/1b2c'
    """
    return store.with_suffix(".vectors") / run_id


def write_shards(store: Path, run_id: str, rows: Iterable[VectorRows], counts: dict[str, int]) -> pa.Table | None:
    """Write one shard for each site, and give its rows of `activations`; None where there is nothing to write.

    Args:
        store: path of the store.
        run_id: of the run.
        rows: in the order in which they shall lie.
        counts: site → shards it has; counted on.
    """
    by_site: dict[str, list[VectorRows]] = {}
    for part in rows:
        by_site.setdefault(part.site, []).append(part)
    catalogue = [_write_shard(store, run_id, parts, counts) for parts in by_site.values()]
    return pa.Table.from_pylist(catalogue) if catalogue else None


def _write_shard(store: Path, run_id: str, parts: list[VectorRows], counts: dict[str, int]) -> dict[str, Any]:
    first = parts[0]
    number = counts.get(first.site, 0)
    counts[first.site] = number + 1
    path = vectors_folder(store, run_id) / first.site / f"{number:05}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        "vectors": (DTYPES[first.dtype][0], np.concatenate([p.vectors for p in parts])),
        "token": (_INTEGERS["<i8"], np.concatenate([p.token for p in parts])),
    }
    if first.expert is not None:
        arrays["expert"] = (_INTEGERS["<i4"], np.concatenate([p.expert for p in parts if p.expert is not None]))
    vectors = arrays["vectors"][1]
    return {
        "site": first.site,
        "shard": number,
        "path": path.relative_to(store.parent).as_posix(),
        "rows": len(vectors),
        "width": int(np.prod(vectors.shape[1:], dtype=np.int64)),
        "dtype": first.dtype,
        "tokens": sum(p.tokens for p in parts),
        "checksum": _write_safetensors(path, arrays, {"run_id": run_id, "site": first.site}),
    }


def _write_safetensors(
    target: Path, arrays: Mapping[str, tuple[str, NDArray[Any]]], metadata: Mapping[str, str]
) -> str:
    """Write arrays, with the name of each one's type, as https://huggingface.co/docs/safetensors lays them out; gives SHA-256."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, array) in arrays.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with written_whole(target) as partial, partial.open("wb") as file:
        pieces: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text]
        pieces += [np.ascontiguousarray(array).data.cast("B") for _, array in arrays.values() if array.size]
        for piece in pieces:
            file.write(piece)
            digest.update(piece)
        file.flush()
        os.fsync(file.fileno())  # it outlives a power cut before the catalogue names it
    return digest.hexdigest()
