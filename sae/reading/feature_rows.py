"""Counts, histograms and logit effects of every latent, as rows of `features`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from moescope.sae.autoencoder import Autoencoder
from moescope.sae.reading.activations import Activations
from moescope.sae.reading.counting import Counts
from moescope.sae.reading.logit_effects import LogitEffects


def feature_rows(autoencoder: Autoencoder, acts: Activations, counts: Counts, effects: LogitEffects | None) -> pa.Table:
    """Rows of `features`, one a latent; what a latent that never fires does not have is null."""
    alive = counts.active > 0
    columns: dict[str, Any] = {
        "feature": pa.array(np.arange(acts.latents), pa.int32()),
        "active": counts.active,
        "tokens": np.full(acts.latents, acts.tokens),
        "documents": counts.documents,
        "mean": pa.array(counts.mean, mask=~alive),
        "maximum": pa.array(counts.maximum, mask=~alive),
        "edges": _lists(counts.edges, pa.float32(), alive),
        "counts": _lists(counts.bins, pa.uint64(), alive),
        "decoder_norm": autoencoder.decoder.float().norm(dim=-1).cpu().numpy().astype(np.float64),
    }
    if effects is not None:
        columns |= {
            "raised_ids": _lists(effects.raised_ids, pa.int32()), "raised": _lists(effects.raised, pa.float32()),
            "lowered_ids": _lists(effects.lowered_ids, pa.int32()), "lowered": _lists(effects.lowered, pa.float32()),
        }  # fmt: skip
    return pa.table(columns)


def _lists(cells: Any, kind: pa.DataType, known: Any = None) -> pa.Array:
    """[row, …] as an Arrow list a row, null where `known` is false."""
    known = np.ones(len(cells), bool) if known is None else known
    offsets = pa.array(np.concatenate([[0], np.cumsum(np.where(known, cells.shape[1], 0))]), pa.int32())
    return pa.ListArray.from_arrays(
        offsets, pa.array(np.ascontiguousarray(cells[known]).ravel(), kind), mask=pa.array(~known)
    )
