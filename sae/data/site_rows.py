"""The vectors that a run kept at one site, as rows: mapped from their shards, gathered where they lie, in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError, RunError, StoreError
from moescope.core.sites import Site
from moescope.store.run import Run
from moescope.store.vectors import VectorShard, vector_shards

Rows = NDArray[np.int64]


class SiteRows:
    """Rows of one site, in the order in which they were recorded.

    Args:
        run: whose vectors they are.
        site: where they were read.
        expert: inside experts, the one expert whose rows to take; None for all of them.
        head: at sites of heads, the one head whose part of each vector to take; None for all heads side by side.
        width: components that are expected; None for whatever there are.
        verify: check every shard against its checksum, which reads it whole. That it has its size is always checked.

    Raises:
        InputError: nothing kept there, no such expert or head, another width than expected.
        StoreError: a shard is missing or damaged, or of another width than the others.

    Attributes:
        site, width: the site, and components of a row.
        token: [row] run-wide number of the token of each row.
        expert: [row] ids at sites inside experts, None elsewhere.
        nbytes: bytes of all shards of the site.
    """

    def __init__(
        self,
        run: Run,
        site: Site,
        *,
        expert: int | None = None,
        head: int | None = None,
        width: int | None = None,
        verify: bool = False,
    ) -> None:
        self.site, self._head = site, head
        self._shards = list(vector_shards(run, str(site), verify=verify))
        inner = self._inner_shape()
        if head is not None and (len(inner) != 2 or not 0 <= head < inner[0]):
            has = f"heads 0 to {inner[0] - 1}" if len(inner) == 2 else "a site of heads, such as blocks.3.attn.hook_z"
            raise InputError(f"{site} has no head {head}", expected=has)
        self.width = int(inner[-1] if head is not None else np.prod(inner))
        if width is not None and width != self.width:
            raise InputError(
                f"vectors at {site} of run {run.name!r} have another width",
                expected=f"{width:,} components",
                found=f"{self.width:,}",
                fix="name the site and the model that they are meant for",
            )
        self.nbytes = sum(shard.raw.nbytes for shard in self._shards)
        self._starts = np.cumsum([0, *(len(shard.token) for shard in self._shards)])
        self.token = np.concatenate([np.asarray(shard.token, np.int64) for shard in self._shards])
        self.expert = self._experts()
        self._places: Rows | None = None
        if expert is not None:
            self._take_expert(run, expert)

    def __len__(self) -> int:
        return len(self.token)

    def gather(self, rows: Rows) -> NDArray[np.float32]:
        """Vectors of some rows, [row, width], in the order asked for. Exact for bfloat16 and float16.

        Raises:
            RunError: a component is NaN or infinite; it says of which token, in which file.
        """
        wanted = rows if self._places is None else self._places[rows]
        found = np.empty((len(rows), self.width), np.float32)
        rising = bool((np.diff(wanted) >= 0).all())
        order = np.arange(len(wanted)) if rising else np.argsort(wanted, kind="stable")
        ends = np.searchsorted(wanted[order], self._starts)
        for shard, start, first, last in zip(self._shards, self._starts[:-1], ends[:-1], ends[1:], strict=True):
            if first < last:
                places = order[first:last]
                picked = self._picked(shard, wanted[places] - start)
                if not np.isfinite(picked).all():
                    raise _not_finite(self.site, shard, wanted[places] - start, picked)
                if rising:
                    found[first:last] = picked
                else:
                    found[places] = picked
        return found

    def _picked(self, shard: VectorShard, rows: Rows) -> NDArray[np.float32]:
        # Rows that follow each other are one slice of the file: no index to walk, and pages come in order.
        whole = len(rows) == int(rows[-1]) - int(rows[0]) + 1 and bool((np.diff(rows) == 1).all())
        raw: Any = shard.raw[int(rows[0]) : int(rows[-1]) + 1] if whole else shard.raw[rows]
        raw = raw if self._head is None else raw[:, self._head]
        return in_float32(np.asarray(raw), shard.dtype).reshape(len(rows), self.width)

    def _inner_shape(self) -> tuple[int, ...]:
        first = self._shards[0]
        for shard in self._shards:
            if shard.raw.shape[1:] != first.raw.shape[1:]:
                raise StoreError(
                    f"{shard.path} holds vectors of another shape than the shards before it",
                    expected=f"{list(first.raw.shape[1:])}",
                    found=f"{list(shard.raw.shape[1:])}",
                    fix="restore it from a copy, or record the run again",
                )
        return tuple(first.raw.shape[1:])

    def _experts(self) -> NDArray[np.int32] | None:
        found = [shard.expert for shard in self._shards if shard.expert is not None]
        return np.concatenate(found) if len(found) == len(self._shards) else None

    def _take_expert(self, run: Run, expert: int) -> None:
        if self.expert is None:
            raise InputError(f"vectors at {self.site} are of no one expert", fix="leave the expert out")
        self._places = np.flatnonzero(self.expert == expert)
        if not len(self._places):
            known = ", ".join(map(str, np.unique(self.expert)[:20]))
            raise InputError(
                f"run {run.name!r} kept no vectors of expert {expert} at {self.site}", expected=f"one of {known}"
            )
        self.token, self.expert = self.token[self._places], self.expert[self._places]


def in_float32(raw: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Components as they lie, in float32; bfloat16 lies as its bits.

    Example:
        >>> in_float32(np.array([0x3F80, 0xC000], np.uint16), "bfloat16").tolist()
        [1.0, -2.0]
    """
    if dtype == "bfloat16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return raw.astype(np.float32, copy=False)


def _not_finite(site: Site, shard: VectorShard, rows: Rows, picked: NDArray[np.float32]) -> RunError:
    bad: NDArray[np.bool_] = np.logical_not(np.isfinite(picked).all(axis=1))
    token = int(shard.token[rows[int(np.flatnonzero(bad)[0])]])
    return RunError(
        f"vectors at {site} are not finite",
        found=f"NaN or infinity in {int(bad.sum()):,} of {len(bad):,} rows read, the first of token {token:,}, in {shard.path}",
        fix="record the site again, in a wider type (dtype float32 or bfloat16)",
    )
