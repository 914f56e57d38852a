"""Whether tokens that are hard to predict from would get more experts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.statistics import document_weights
from moescope.routing.balance.groups import Grouping
from moescope.routing.counterfactuals.comparison import Tally

Floats = NDArray[np.float64]
_FIELDS = ("with_nll", "nll", "nll_squared", "experts_with_nll", "experts_squared", "product")


def correlation_rows(tally: Tally, grouping: Grouping, *, draws: int, seed: int) -> list[dict[str, Any]]:
    """Pearson correlation of experts per token with NLL in each group; none where it is not defined."""
    rows = []
    for name, cells in grouping.cells():
        sums = np.stack([tally.sums[field][cells] for field in _FIELDS], axis=1)
        value = float(_pearson(sums.sum(0)))
        if np.isnan(value):
            continue
        low = high = float("nan")
        if len(sums) > 1:
            drawn = _pearson(document_weights(len(sums), draws=draws, seed=seed).astype(np.float64) @ sums)
            if not np.isnan(drawn).all():
                low, high = map(float, np.nanquantile(drawn, [0.025, 0.975]))
        place = {"layer": tally.router.layer, "block": tally.router.block}
        place |= {grouping.column: name} if grouping.column else {}
        estimate = {"value": value, "ci_low": low, "ci_high": high, "null": 0.0, "n": int(sums[:, 0].sum())}
        rows.append(place | {"metric": "correlation with NLL"} | estimate)
    return rows


def _pearson(sums: Floats) -> Floats:
    """[…] correlation from sums […, field]; NaN where either does not vary."""
    n, y, yy, x, xx, xy = np.moveaxis(sums, -1, 0)
    spread_x, spread_y = n * xx - x**2, n * yy - y**2
    flat = (n < 3) | (spread_x <= 1e-9 * n * xx) | (spread_y <= 1e-9 * n * yy)
    scale = np.sqrt(np.where(flat, 1.0, spread_x) * np.where(flat, 1.0, spread_y))
    found: Floats = np.where(flat, np.nan, (n * xy - x * y) / scale)
    return found
