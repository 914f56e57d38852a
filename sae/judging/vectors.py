"""Vectors that an autoencoder is judged on: a seeded sample of those a run recorded, or read while the model runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.core.sites import Site
from moescope.probes.batches import Batch
from moescope.probes.live_model import LiveModel
from moescope.sae.autoencoder import Autoencoder
from moescope.sae.data.live import SLOT_SITES, site_vectors
from moescope.sae.judging.run_tokens import Ints, RunTokens
from moescope.store.run import Run
from moescope.store.vectors import VectorShard, vector_shards


@dataclass(frozen=True, eq=False)
class Vectors:
    """Vectors of some tokens, in float32 on the host.

    Attributes:
        x: [row, component] what is encoded.
        y: [row, component] what the reconstruction stands for: `x` itself, but for transcoders.
        place: [row] where each one's token stands in the run's `RunTokens`.
    """

    x: Float[torch.Tensor, "row component"]
    y: Float[torch.Tensor, "row component"]
    place: Ints

    def __len__(self) -> int:
        return len(self.place)

    def only(self, rows: NDArray[np.bool_]) -> Vectors:
        """Those of some rows."""
        kept = torch.from_numpy(np.flatnonzero(rows))
        x = self.x[kept]
        return Vectors(x, x if self.y is self.x else self.y[kept], self.place[rows])


def recorded_vectors(
    run: Run,
    autoencoder: Autoencoder,
    tokens: RunTokens,
    eligible: NDArray[np.bool_],
    *,
    limit: int,
    seed: int,
    verify: bool = True,
) -> Vectors:
    """A random sample of the vectors that a run kept at the autoencoder's site.

    Args:
        run, tokens: the run and its tokens.
        autoencoder: tells sites, expert, head and widths.
        eligible: [token] which may be taken.
        limit: how many at most; all of them where there are fewer.
        seed: of the sample.
        verify: hold the shards against their checksums first.

    Raises:
        InputError: none kept there, or of another width, or vectors that are no numbers.
        StoreError: a shard that is missing or damaged.
    """
    shards = list(vector_shards(run, str(autoencoder.site), verify=verify))
    eligible = eligible & _has_target(run, autoencoder, tokens)
    kept = [_eligible_rows(shard, autoencoder, tokens, eligible) for shard in shards]
    total = sum(len(rows) for rows, _ in kept)
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(limit, total), replace=False))
    parts, places, start = [], [], 0
    for shard, (rows, place) in zip(shards, kept, strict=True):
        mine = chosen[(chosen >= start) & (chosen < start + len(rows))] - start
        start += len(rows)
        parts.append(_as_floats(shard, rows[mine]))
        places.append(place[mine])
    where = np.concatenate(places)
    x = fitting(_one_head(np.concatenate(parts), autoencoder.head), autoencoder.d_in, autoencoder, autoencoder.site)
    if autoencoder.target_site is None:
        return Vectors(x, x, where)
    found = _of_tokens(run, autoencoder.target_site, tokens.token[where], autoencoder.expert, verify=verify)
    return Vectors(x, fitting(found, autoencoder.d_out, autoencoder, autoencoder.target_site), where)


def live_vectors(
    model: LiveModel, autoencoder: Autoencoder, batches: Iterable[Batch], tokens: RunTokens, eligible: NDArray[np.bool_]
) -> Vectors:
    """Vectors at the autoencoder's site while the model runs over batches of a run's own sequences.

    Raises:
        InputError: a site that the model does not have, another width, or vectors that are no numbers.
    """
    sites = [site for site in (autoencoder.site, autoencoder.target_site) if site is not None]
    columns: list[list[torch.Tensor]] = [[] for _ in sites]
    places: list[Ints] = []
    for batch in batches:
        passed = site_vectors(model, batch, sites)
        start = np.searchsorted(tokens.sequence, passed.sequence)
        found = passed[sites[0]].of_expert(autoencoder.expert).of_head(autoencoder.head)
        token = found.token.cpu().numpy()
        place = (start + passed.position)[token]
        counts = eligible[place]
        others = []
        for site in sites[1:]:
            of = passed[site].of_expert(autoencoder.expert)
            row = np.full(len(passed), -1)
            row[of.token.cpu().numpy()] = np.arange(len(of.token))
            counts &= row[token] >= 0
            others.append((of, row))
        kept = np.flatnonzero(counts)
        columns[0].append(found.vectors.float().cpu()[torch.from_numpy(kept)])
        for column, (of, row) in zip(columns[1:], others, strict=True):
            column.append(of.vectors.float().cpu()[torch.from_numpy(row[token[kept]])])
        places.append(place[kept])
    widths = (autoencoder.d_in, autoencoder.d_out)
    whole = [
        fitting(torch.cat(column) if column else torch.zeros(0, width), width, autoencoder, site)
        for column, width, site in zip(columns, widths, sites, strict=False)
    ]
    return Vectors(whole[0], whole[-1], np.concatenate(places) if places else np.zeros(0, np.int64))


def fitting(x: torch.Tensor, width: int, autoencoder: Autoencoder, site: Site) -> Float[torch.Tensor, "row component"]:
    """Vectors as they are, once they are known to fit.

    Raises:
        InputError: another width, or components that are no numbers.
    """
    if x.shape[1] != width:
        raise InputError(
            f"{autoencoder.name} does not fit the vectors at {site}",
            expected=f"{width:,} components",
            found=f"{x.shape[1]:,}",
            fix="judge it on vectors of the model and site it was trained on",
        )
    finite = torch.isfinite(x).all(-1)
    if not bool(finite.all()):
        raise InputError(
            f"vectors at {site} are no numbers",
            found=f"NaN or infinity in {int((~finite).sum()):,} of {len(x):,}",
            fix="record them in another dtype (float32, bfloat16)",
        )
    return x


def _has_target(run: Run, autoencoder: Autoencoder, tokens: RunTokens) -> NDArray[np.bool_]:
    """[token] Whether the expert whose output a transcoder predicts was chosen; True where it predicts no expert's."""
    found = np.ones(len(tokens.token), bool)
    target = autoencoder.target_site
    if target is not None and target.tensor in SLOT_SITES and autoencoder.expert is not None:
        shards = vector_shards(run, str(target))
        found = np.isin(tokens.token, np.concatenate([_tokens_of(shard, autoencoder.expert) for shard in shards]))
    return found


def _tokens_of(shard: VectorShard, expert: int | None) -> Ints:
    """[row] token; −1 for rows of other experts."""
    token = np.asarray(shard.token, np.int64)
    return token if expert is None or shard.expert is None else np.where(np.asarray(shard.expert) == expert, token, -1)


def _of_tokens(run: Run, site: Site, wanted: Ints, expert: int | None, *, verify: bool) -> torch.Tensor:
    """Vectors that a run kept at a site of some tokens, in the order asked for."""
    shards = list(vector_shards(run, str(site), verify=verify))
    token = np.concatenate([_tokens_of(shard, expert) for shard in shards])
    order = np.argsort(token, kind="stable")
    at = order[np.minimum(np.searchsorted(token[order], wanted), len(token) - 1)]
    if lost := int((token[at] != wanted).sum()):
        raise InputError(
            f"run {run.name!r} lacks vectors at {site} for {lost:,} of {len(wanted):,} tokens",
            fix="record both sites in one run, with one sample",
        )
    ends = np.cumsum([len(shard.token) for shard in shards])
    found: NDArray[np.float32] | None = None
    for shard, end in zip(shards, ends, strict=True):
        mine = np.flatnonzero((at >= end - len(shard.token)) & (at < end))
        part = _as_floats(shard, at[mine] - (end - len(shard.token)))
        part = part.reshape(len(part), -1)
        found = np.empty((len(wanted), part.shape[1]), np.float32) if found is None else found
        found[mine] = part
    assert found is not None
    return torch.from_numpy(found)


def _eligible_rows(
    shard: VectorShard, autoencoder: Autoencoder, tokens: RunTokens, eligible: NDArray[np.bool_]
) -> tuple[Ints, Ints]:
    """Rows of a shard that may be taken, and their tokens' places."""
    place = tokens.places(np.asarray(shard.token))
    kept = (place >= 0) & eligible[place]
    if autoencoder.expert is not None:
        target = autoencoder.target_site
        if shard.expert is None and target is not None and target.tensor in SLOT_SITES:
            rows = np.flatnonzero(kept)
            return rows, place[rows]
        if shard.expert is None:
            raise InputError(
                f"{autoencoder.name} is of expert {autoencoder.expert}, and vectors at {autoencoder.site} are of none"
            )
        kept &= np.asarray(shard.expert) == autoencoder.expert
    rows = np.flatnonzero(kept)
    return rows, place[rows]


def _as_floats(shard: VectorShard, rows: Ints) -> NDArray[np.float32]:
    raw: NDArray[Any] = np.asarray(shard.raw[rows])
    if shard.dtype == "bfloat16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return raw.astype(np.float32)


def _one_head(x: NDArray[np.float32], head: int | None) -> torch.Tensor:
    """One head's vectors, or all heads' side by side."""
    whole = x[:, head] if x.ndim == 3 and head is not None else x
    return torch.from_numpy(np.ascontiguousarray(whole.reshape(len(whole), -1)))
