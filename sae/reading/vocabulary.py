"""Words that only logit effects name, for the run's vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from moescope.probes.pieces import token_bytes
from moescope.sae.reading.logit_effects import LogitEffects
from moescope.store.run import Run

if TYPE_CHECKING:
    from moescope.probes.live_model import LiveModel


def missing_words(run: Run, model: LiveModel, effects: LogitEffects) -> pa.Table:
    """Rows of `vocabulary` for token ids that the run has not seen; none without a tokenizer."""
    ids = np.unique(np.concatenate([effects.raised_ids.ravel(), effects.lowered_ids.ravel()]))
    known = [i for (i,) in run.store.fetch("SELECT token_id FROM vocabulary WHERE run_id = ?", [run.run_id])]
    fresh = [] if model.tokenizer is None else [int(i) for i in np.setdiff1d(ids, np.array(known, np.int64))]
    raw = [token_bytes(model.tokenizer, i) for i in fresh]
    return pa.table(
        {
            "run_id": pa.array([run.run_id] * len(fresh), pa.string()),
            "token_id": pa.array(fresh, pa.int32()),
            "bytes": pa.array(raw, pa.binary()),
            "text": pa.array([part.decode("utf-8", "replace") for part in raw], pa.string()),
        }
    )
