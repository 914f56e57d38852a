"""In which order the experts of a layer stand on the map."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moescope.routing.experts.readings import asked
from moescope.store.run import Run

Sort = Literal["index", "load", "similarity"]
WORDS = {
    "index": "by their number",
    "load": "by load, the busiest of each layer first",
    "similarity": "of each layer by likeness of use: leaves of an average-linkage tree over 1 − correlation of their shares of each "
    "document's decisions (analysis expert_clusters); those never chosen last",
}


def placed(run: Run, cells: pd.DataFrame, sort: Sort) -> pd.Series:
    """[cell] place in the row of its router, from 0.

    Args:
        run: whose experts.
        cells: layer, block, expert and tokens, one row an expert.
        sort: the order.
    """
    if sort == "index":
        return cells["expert"].astype(int)
    keys = -cells["tokens"].astype(float).fillna(-1.0)
    if sort == "similarity":
        leaves = asked(run, "expert_clusters", shuffles=1).df()
        leaves = leaves[leaves["metric"] == "cluster"][["layer", "block", "expert", "place"]]
        merged = cells[["layer", "block", "expert"]].merge(leaves, on=["layer", "block", "expert"], how="left")
        keys = pd.Series(merged["place"].astype(float).fillna(np.inf).to_numpy(), index=cells.index)
    order = cells.assign(key=keys).sort_values(["layer", "block", "key", "expert"], kind="stable")
    place = order.groupby(["layer", "block"], sort=False).cumcount()
    return place.reindex(cells.index)


def gini(amounts: NDArray[np.float64]) -> float:
    """Gini coefficient of amounts that are not negative: 0 where all are equal, 1 − 1 ÷ n where one has everything.

    Example:
        >>> gini(np.array([1.0, 1, 1, 1])), gini(np.array([0.0, 0, 0, 8]))
        (0.0, 0.75)
    """
    known = np.sort(amounts[np.isfinite(amounts)])
    if not len(known) or known.sum() <= 0:
        return float("nan")
    ranks = np.arange(1, len(known) + 1)
    return float(2 * (ranks * known).sum() / (len(known) * known.sum()) - (len(known) + 1) / len(known))
