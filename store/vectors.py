"""Reading recorded vectors back: mapped from their shards, checked on demand, without a library of tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError, StoreError
from moescope.store.run import Run
from moescope.store.vector_shards import DTYPES

_KINDS = dict(DTYPES.values()) | {"I64": "<i8", "I32": "<i4"}
_PIECE = 1 << 20


@dataclass(frozen=True)
class VectorShard:
    """One shard, its arrays mapped from the file: nothing is read until it is looked at.

    Attributes:
        path: the file.
        dtype: type of the components: float32, bfloat16, float16 or float64.
        raw: [row, …] as they lie; bfloat16, which NumPy does not have, as its bits in uint16.
        token: run-wide number of each row's token.
        expert: id of each row's expert, None where the site is not inside experts.
        checksum: SHA-256 that the catalogue holds of the file.
    """

    path: Path
    dtype: str
    raw: NDArray[Any]
    token: NDArray[np.int64]
    expert: NDArray[np.int32] | None
    checksum: str

    def float32(self) -> NDArray[np.float32]:
        """The vectors in float32, read from the file. Exact for bfloat16 and float16."""
        if self.dtype == "bfloat16":
            return (self.raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return self.raw.astype(np.float32)

    def verify(self) -> None:
        """Raise `StoreError` unless the file is, byte for byte, the one that was written."""
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
        if digest.hexdigest() != self.checksum:
            raise StoreError(
                f"{self.path} is not the file that was recorded",
                expected=f"SHA-256 {self.checksum}",
                found=digest.hexdigest(),
                fix="restore it from a copy, or record the run again",
            )


def vector_sites(run: Run) -> list[str]:
    """Sites at which a run kept vectors, sorted."""
    query = "SELECT DISTINCT site FROM activations WHERE run_id = ? ORDER BY site"
    return [site for (site,) in run.store.fetch(query, [run.run_id])]


def vector_shards(run: Run, site: str, *, verify: bool = False) -> Iterator[VectorShard]:
    """The shards of vectors that a run kept at a site, in the order in which they were recorded.

    Args:
        run: the run.
        site: for instance `blocks.3.hook_resid_post`.
        verify: check every shard against its checksum first, which reads it whole.

    Raises:
        InputError: the run kept no vectors there.
        StoreError: a shard is missing, is no shard, or with `verify` is not the one that was written.
    """
    query = "SELECT path, dtype, checksum FROM activations WHERE run_id = ? AND site = ? ORDER BY shard"
    found = run.store.fetch(query, [run.run_id, site])
    if not found:
        kept = ", ".join(vector_sites(run)) or "none"
        raise InputError(f"run {run.name!r} kept no vectors at {site}", expected=f"a site it kept: {kept}")
    for path, dtype, checksum in found:
        shard = _open(run.store.path.parent / path, dtype, checksum)
        if verify:
            shard.verify()
        yield shard


def _open(path: Path, dtype: str, checksum: str) -> VectorShard:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length < path.stat().st_size else None
    except FileNotFoundError as missing:
        raise StoreError(
            f"{path} is missing", fix="keep the folder of vectors beside the store when you move it"
        ) from missing
    except ValueError:
        header = None
    if not isinstance(header, dict) or not {"vectors", "token"} <= set(header):
        raise StoreError(f"{path} is not a shard of vectors", fix="restore it from a copy, or record the run again")
    end = 8 + length + max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    if path.stat().st_size != end:
        raise StoreError(
            f"{path} is not whole",
            expected=f"{end:,} bytes",
            found=f"{path.stat().st_size:,}",
            fix="restore it from a copy, or record the run again",
        )
    arrays = {name: _mapped(path, 8 + length, entry) for name, entry in header.items() if name != "__metadata__"}
    return VectorShard(path, dtype, arrays["vectors"], arrays["token"], arrays.get("expert"), checksum)


def _mapped(path: Path, start: int, entry: dict[str, Any]) -> NDArray[Any]:
    kind, shape = np.dtype(_KINDS[entry["dtype"]]), tuple(entry["shape"])
    if 0 in shape:
        return np.empty(shape, kind)
    return np.memmap(path, kind, "r", start + entry["data_offsets"][0], shape)
