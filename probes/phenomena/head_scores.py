"""Numbers of attention heads from several sequences: their means with intervals, and the heads that lead."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.core.statistics import bootstrap_ratio
from moescope.probes.phenomena.head_map import HeadMap

if TYPE_CHECKING:
    import pandas as pd

    from moescope.store.run import Run


@dataclass(frozen=True)
class HeadMetric:
    """One number of every head, sequence by sequence.

    Attributes:
        name: what was measured, as in the table `heads`.
        sums: [sequence, head] its sum over the observations of a sequence.
        n: [sequence] how many observations; 0 where the sequence does not count.
        condition: under which it was measured: `base` for the model as it is.
    """

    name: str
    sums: NDArray[np.float64]
    n: NDArray[np.int64]
    condition: str = "base"

    @property
    def value(self) -> NDArray[np.float64]:
        """[head] the mean over all observations; NaN where there are none."""
        total = int(self.n.sum())
        return self.sums.sum(0) / total if total else np.full(self.sums.shape[1], np.nan)

    def interval(self, *, draws: int = 1000, seed: int = 0) -> tuple[NDArray[Any], NDArray[Any]]:
        """[head] bounds of a 95 % percentile bootstrap over sequences; NaN with fewer than two."""
        used = self.n > 0
        _, low, high = bootstrap_ratio(self.sums[used], self.n[used, None].astype(float), draws=draws, seed=seed)
        return low, high


@dataclass(frozen=True)
class HeadScores:
    """What a protocol found about the heads of a model.

    Attributes:
        heads: which there are; every array's last axis.
        metrics: by name.
        nulls: metric → the metric that is its chance level.
        sequences: what each sequence was: one mapping of facts each.
        withheld: metric → why it is not told.
        notes: what a reader must know besides.
        run: where it was recorded; None without a store.
    """

    heads: HeadMap
    metrics: dict[str, HeadMetric]
    nulls: dict[str, str] = field(default_factory=dict)
    sequences: tuple[dict[str, Any], ...] = ()
    withheld: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    run: Run | None = None

    @property
    def told(self) -> list[HeadMetric]:
        """Metrics that are not withheld."""
        return [metric for name, metric in self.metrics.items() if name not in self.withheld]

    def value(self, metric: str) -> NDArray[np.float64]:
        """[head] of a metric.

        Raises:
            InputError: it was not measured, or is withheld.
        """
        if metric in self.withheld:
            raise InputError(f"{metric} is withheld", found=self.withheld[metric])
        if metric not in self.metrics:
            raise InputError(f"{metric!r} was not measured", expected=", ".join(self.metrics))
        return self.metrics[metric].value

    def top(self, metric: str, count: int) -> list[tuple[int, str, int]]:
        """The heads that lead: (layer, block, head), largest first, ties by layer and head."""
        order = np.argsort(-self.value(metric), kind="stable")[:count]
        found = [self.heads.at(int(column)) for column in order]
        return [(place.layer, place.block, head) for place, head in found]

    def df(self, *, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
        """Long: layer, block, head, metric, condition, value, ci_low, ci_high, null, n.

        Args:
            draws, seed: of the bootstrap over sequences.
        """
        import pandas as pd

        parts = []
        for name, metric in self.metrics.items():
            if name in self.nulls.values():
                continue
            low, high = metric.interval(draws=draws, seed=seed)
            null = self.metrics[self.nulls[name]].value if name in self.nulls else np.full(self.heads.total, np.nan)
            parts.append(
                pd.DataFrame(
                    {
                        "layer": self.heads.layers,
                        "block": np.concatenate([[p.block] * p.heads for p in self.heads.places]),
                        "head": np.concatenate([np.arange(p.heads) for p in self.heads.places]),
                        "metric": name,
                        "condition": metric.condition,
                        "value": metric.value,
                        "ci_low": low,
                        "ci_high": high,
                        "null": null,
                        "n": int(metric.n.sum()),
                    }
                )
            )
        return pd.concat(parts, ignore_index=True)

    def named(self, metric: str, count: int = 5) -> str:
        """The leading heads by name with their values, for a title: `L3·H7 0.91, …`."""
        values = self.value(metric)
        order = np.argsort(-values, kind="stable")[:count]
        return ", ".join(f"{self.heads.name(int(c))} {values[c]:.2f}" for c in order)
