"""Links between latents as rows: neighbours, pairs that fire together, families, splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.sae.autoencoder import Autoencoder
from moescope.sae.reading.activations import Activations
from moescope.sae.reading.cosines import Neighbours, neighbours, splits
from moescope.sae.reading.families import families, family_pairs, pair_graph
from moescope.sae.reading.pairs import Together, measured, moved_within_documents, phi

NEIGHBOURS, PARTNERS = 10, 5
OVERLAP, DENSE = 0.1, 0.1
_RANDOM = "as many random directions"
_DOCUMENTS = "independent within each document"


@dataclass(frozen=True)
class FamilyCounts:
    """How many families and members there are, and how many where activations are moved within their documents.

    Attributes:
        families, members: found.
        null_families, null_members: with activations moved.
        latents: that could be in one.
    """

    families: int
    members: int
    null_families: int
    null_members: int
    latents: int


def link_rows(
    autoencoder: Autoencoder, acts: Activations, others: Sequence[Autoencoder], *, draws: int = 500, seed: int = 0
) -> tuple[pa.Table, FamilyCounts]:
    """Rows of `feature_links`, and the number of families beside their null.

    Args:
        autoencoder: whose latents.
        acts: their activations.
        others: autoencoders of the same site, for neighbours and splits.
        draws: bootstrap resamples of documents.
        seed: of those, of random directions and of moves.
    """
    tables = [_near(neighbours(autoencoder, autoencoder, top=NEIGHBOURS, seed=seed), "cosine", autoencoder)]
    for other in others:
        tables.append(_near(neighbours(autoencoder, other, top=NEIGHBOURS, seed=seed), "cosine", other))
        if other.d_sae > autoencoder.d_sae:
            tables.append(_near(splits(autoencoder, other, seed=seed), "split", other))
    graph = pair_graph(acts, threshold=OVERLAP, dense=DENSE, partners=PARTNERS)
    together = measured(acts, graph.partner_first, graph.partner_second, phi, draws=draws, seed=seed)
    tables.append(_together(together, "coactivation", autoencoder))
    found = families(graph, acts.counts)
    tables.append(_together(family_pairs(acts, found, draws=draws, seed=seed), "family", autoencoder))
    moved = moved_within_documents(acts, seed)
    null = families(pair_graph(moved, threshold=OVERLAP, dense=DENSE, partners=1), moved.counts)
    usual = (acts.counts >= 20) & (acts.counts <= DENSE * acts.tokens)
    sizes = FamilyCounts(len(found), _members(found), len(null), _members(null), int(usual.sum()))
    return pa.concat_tables(tables), sizes


def _members(found: list[tuple[int, list[int]]]) -> int:
    return len({member for _, members in found for member in members})


def _near(found: Neighbours, kind: str, other: Autoencoder) -> pa.Table:
    n = len(found.first)
    nothing = np.full(n, np.nan)
    null = np.full(n, found.null)
    return _rows(kind, found.first, other, found.second, (found.value, nothing, nothing, null), _RANDOM, None)


def _together(found: Together, kind: str, own: Autoencoder) -> pa.Table:
    cells = found.value, found.low, found.high, found.null
    return _rows(kind, found.first, own, found.second, cells, _DOCUMENTS, found.tokens)


def _rows(
    kind: str,
    first: Any,
    other: Autoencoder,
    second: Any,
    cells: tuple[Any, ...],
    null_kind: str,
    n: NDArray[Any] | None,
) -> pa.Table:
    rows = len(first)
    names = ("value", "ci_low", "ci_high", "null_value")
    wide = [np.asarray(part, np.float64) for part in cells]
    return pa.table(
        {
            "kind": pa.array([kind] * rows, pa.string()),
            "feature": pa.array(first, pa.int32()),
            "other_sae_id": pa.array([other.sae_id] * rows, pa.string()),
            "other_feature": pa.array(second, pa.int32()),
            **{name: pa.array(part, mask=~np.isfinite(part)) for name, part in zip(names, wide, strict=True)},
            "null_kind": pa.array([null_kind] * rows, pa.string()),
            "n": pa.nulls(rows, pa.int64()) if n is None else pa.array(n, pa.int64()),
        }
    )
