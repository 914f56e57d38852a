"""Recorded vectors of some sites, as arrays: whole sequences of them, up to a number of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.core.sites import Site
from moescope.store.run import Run
from moescope.store.vectors import VectorShard, vector_shards, vector_sites

_TOKENS = """
    SELECT t.token, t.sequence_id, t.position, s.document_id
    FROM tokens t
    JOIN sequences s ON s.run_id = t.run_id AND s.sequence_id = t.sequence_id
    WHERE t.run_id = $run
    ORDER BY t.token
"""


_EXPERTS = """
    SELECT n_experts
    FROM layers
    WHERE run_id = $run AND layer = $layer AND block = $block AND kind = 'moe'
"""


@dataclass(frozen=True)
class Vectors:
    """Vectors of one site.

    Attributes:
        site: where they were read.
        values: [row, component] float32, all finite.
        expert: [row] id of the expert, None where the site is not inside experts.
        at: [row] index into the tokens below.
        token, sequence, position: [token] in the order of the run, sequence by sequence.
        document: [token] index of the document, dense.
        recorded: tokens that the run kept at the site, of which these are some or all.
        invalid: rows left out because they hold NaN or infinities.
        experts: experts that the layer has (null ones aside), None where the site is not inside experts.
    """

    site: Site
    values: NDArray[np.float32]
    expert: NDArray[np.int64] | None
    at: NDArray[np.int64]
    token: NDArray[np.int64]
    sequence: NDArray[np.int64]
    position: NDArray[np.int64]
    document: NDArray[np.int64]
    recorded: int
    invalid: int
    experts: int | None

    @property
    def documents(self) -> int:
        """How many documents the tokens come from."""
        return int(self.document.max(initial=-1)) + 1

    @property
    def inside(self) -> str:
        """Whose neurons they are, in words."""
        return "dense MLP" if self.expert is None else "experts"

    def emptied(self) -> Vectors:
        """The same without its values, to be kept when they have been looked at."""
        return replace(self, values=self.values[:0])


@dataclass(frozen=True)
class _Tokens:
    token: NDArray[np.int64]
    sequence: NDArray[np.int64]
    position: NDArray[np.int64]
    document: NDArray[np.int64]


def sites_of(run: Run, tensors: tuple[str, ...]) -> list[Site]:
    """The sites among `tensors` at which the run kept vectors, in order of layer.

    Raises:
        InputError: it kept none there; the message names what to record.
    """
    kept = [Site.parse(name) for name in vector_sites(run)]
    found = sorted(site for site in kept if site.tensor in tensors)
    if not found:
        wanted = " or ".join(_example(tensor) for tensor in tensors)
        raise InputError(
            f"run {run.name!r} kept no vectors that this needs",
            expected=f"vectors at {wanted}",
            found=", ".join(map(str, kept[:6])) or "none",
            fix=f"record with --probe activations --site {_example(tensors[0])} --sample 1",
        )
    return found


def _example(tensor: str) -> str:
    return f"blocks.L.{tensor}" if tensor.startswith("hook_resid") else f"blocks.L.mlp.{tensor}"


def read_vectors(run: Run, sites: list[Site], *, limit: int, seed: int) -> Iterator[Vectors]:
    """Vectors of each site: whole sequences, drawn by `seed`, until `limit` tokens are reached (the last one cut)."""
    table = run.sql(_TOKENS).fetchnumpy()
    tokens = _Tokens(
        *(np.ma.filled(table[n], -1).astype(np.int64) for n in ("token", "sequence_id", "position", "document_id"))
    )
    for site in sites:
        yield _read(run, site, tokens, limit, seed)


def _read(run: Run, site: Site, tokens: _Tokens, limit: int, seed: int) -> Vectors:
    shards = list(vector_shards(run, str(site)))
    present = np.unique(np.concatenate([np.asarray(shard.token) for shard in shards]))
    present = present[np.isin(present, tokens.token)]
    picked = _picked(present, tokens.sequence[np.searchsorted(tokens.token, present)], limit, seed)
    parts = [_rows(shard, picked) for shard in shards]
    values = np.concatenate([value for value, _, _ in parts])
    rows = np.concatenate([row for _, row, _ in parts])
    experts = [expert for _, _, expert in parts if expert is not None]
    expert = np.concatenate(experts) if experts else None
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        values, rows, expert = values[finite], rows[finite], None if expert is None else expert[finite]
    kept, at = np.unique(rows, return_inverse=True)
    place = np.searchsorted(tokens.token, kept)
    _, document = np.unique(tokens.document[place], return_inverse=True)
    return Vectors(
        site, values, expert, at.astype(np.int64), kept, tokens.sequence[place], tokens.position[place],
        document.astype(np.int64), len(present), int((~finite).sum()), None if expert is None else _experts(run, site, expert),
    )  # fmt: skip


def _experts(run: Run, site: Site, seen: NDArray[np.int64]) -> int:
    found = run.sql(_EXPERTS, {"layer": site.layer, "block": site.block}).fetchall()
    return int(found[0][0]) if found and found[0][0] else int(seen.max(initial=-1)) + 1


def _picked(present: NDArray[np.int64], sequence: NDArray[np.int64], limit: int, seed: int) -> NDArray[np.int64]:
    """Tokens of whole sequences in random order, until the limit; ascending."""
    if len(present) <= limit:
        return present
    known, of, sizes = np.unique(sequence, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(known))
    before = np.empty(len(known), np.int64)
    before[order] = np.cumsum(sizes[order]) - sizes[order]
    within = np.arange(len(present)) - np.searchsorted(sequence, known)[of] if _ascending(sequence) else _within(of)
    return present[before[of] + within < limit]


def _ascending(values: NDArray[np.int64]) -> bool:
    return bool((values[1:] >= values[:-1]).all())


def _within(of: NDArray[Any]) -> NDArray[np.int64]:
    """[row] how many rows of the same group come before it."""
    order = np.argsort(of, kind="stable")
    ordered = of[order]
    first = np.searchsorted(ordered, ordered)
    count = np.empty(len(of), np.int64)
    count[order] = np.arange(len(of)) - first
    return count


def _rows(
    shard: VectorShard, picked: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64] | None]:
    """Vectors, tokens and experts of the shard's rows that belong to picked tokens."""
    token = np.asarray(shard.token)
    inside = np.flatnonzero(np.isin(token, picked))
    part = replace(shard, raw=np.asarray(shard.raw)[inside] if len(inside) == len(token) else shard.raw[inside])
    values = part.float32().reshape(len(inside), int(np.prod(shard.raw.shape[1:], dtype=np.int64)))
    expert = None if shard.expert is None else np.asarray(shard.expert)[inside].astype(np.int64)
    return values, token[inside].astype(np.int64), expert


def reading_notes(read: list[Vectors]) -> tuple[str, ...]:
    """What a reader must know of tokens and rows left out."""
    notes = []
    used, recorded = max(len(v.token) for v in read), max(v.recorded for v in read)
    if used < recorded:
        notes.append(f"{used:,} of {recorded:,} recorded tokens are looked at, in whole sequences.")
    if invalid := sum(v.invalid for v in read):
        notes.append(f"{invalid:,} vectors with NaN or infinities are left out.")
    return tuple(notes)
