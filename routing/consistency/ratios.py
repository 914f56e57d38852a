"""Ratios of sums over documents, by layer or by part, beside their closed-form chance level and shuffled controls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moescope.core.statistics import bootstrap_ratio, quotient
from moescope.routing.consistency.decisions import Parts
from moescope.routing.trace import Trace

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Sums:
    """Numerators and denominators, both [..., router, metric]."""

    top: Floats
    bottom: Floats

    def over_routers(self) -> Sums:
        """Summed over routers, which stay as an axis of one."""
        return Sums(self.top.sum(-2, keepdims=True), self.bottom.sum(-2, keepdims=True))

    def ratio(self) -> Floats:
        """NaN where there is nothing to divide by."""
        return quotient(self.top, self.bottom)


@dataclass(frozen=True)
class Measured:
    """Everything a table needs.

    Attributes:
        metrics: columns that name each metric: {"metric": …, other columns: …}.
        observed: [row, router, metric], rows being documents in parts.
        null: [part, router, metric] expected under independent balanced choices.
        shuffled: column → [shuffle, part, router, metric].
        n: [part, router, metric] observations.
    """

    metrics: list[dict[str, Any]]
    observed: Sums
    null: Sums
    shuffled: Mapping[str, Sums]
    n: Floats


def tabled(measured: Measured, trace: Trace, parts: Parts, *, by: str, draws: int, seed: int) -> pd.DataFrame:
    """One row for each group and metric that was observed: by "layer" a group is a router, otherwise a part."""
    observed, null, shuffled, n = measured.observed, measured.null, measured.shuffled, measured.n
    if by != "layer":
        observed, null, n = observed.over_routers(), null.over_routers(), n.sum(-2, keepdims=True)
        shuffled = {column: sums.over_routers() for column, sums in shuffled.items()}
    chance = null.ratio()
    control = {column: sums.ratio().mean(0) for column, sums in shuffled.items()}
    rows = []
    for part, name in enumerate(parts.names):
        mine = parts.part == part
        if not mine.any():
            continue
        value, low, high = bootstrap_ratio(observed.top[mine], observed.bottom[mine], draws=draws, seed=seed)
        for group, metric in np.argwhere(observed.bottom[mine].sum(0) > 0):
            at = (group, metric)
            router = trace.routers[group]
            place = {"layer": router.layer, "block": router.block} if by == "layer" else {}
            place |= {} if name is None else {by: name}
            rows.append(
                place
                | measured.metrics[metric]
                | {"value": value[at], "ci_low": low[at], "ci_high": high[at], "null": chance[part, group, metric]}
                | {column: values[part, group, metric] for column, values in control.items()}
                | {"n": int(n[part, group, metric])}
            )
    return pd.DataFrame(rows)
