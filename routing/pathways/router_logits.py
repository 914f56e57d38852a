"""Reading the recorded logits of a router."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.routing.trace import Router
from moescope.store.run import Run

_LOGITS = """
    SELECT token, logits
    FROM router_logits
    WHERE run_id = $run AND layer = $layer AND block = $block
    ORDER BY token
"""


def read_logits(run: Run, router: Router, token: NDArray[np.int64]) -> NDArray[np.float32]:
    """[token, expert] recorded logits of these tokens.

    Raises:
        InputError: some token has none, or not one for each expert.
    """
    found = run.sql(_LOGITS, {"layer": router.layer, "block": router.block}).to_arrow_table()
    rows, listed = np.asarray(found.column(0)), found.column(1).combine_chunks()
    if isinstance(listed, pa.ChunkedArray) or not np.isin(token, rows).all():
        raise InputError(
            f"run {run.name!r} does not have the router logits of every token at {router.name}",
            expected="rows in router_logits",
            fix="record it again with --probe router_logits",
        )
    if not (np.asarray(listed.value_lengths().fill_null(0)) == router.n_experts).all():
        raise InputError(
            f"router logits of {router.name} do not have one score for each expert",
            expected=f"{router.n_experts} scores",
        )
    scores = np.asarray(listed.flatten(), np.float32).reshape(-1, router.n_experts)
    return scores[np.searchsorted(rows, token)]
