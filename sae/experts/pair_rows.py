"""Rows of `feature_experts`, put together column by column; which pairs are kept; latents of like frequency."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.sae.experts.passes import GroupSums, Sums
from moescope.sae.experts.subject import Router, Subject

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
PER_EXPERT = 20


@dataclass(frozen=True)
class Setting:
    """What all rows of one measurement share."""

    subject: Subject
    sums: Sums
    groups: GroupSums
    alive: Ints
    others: int
    draws: int
    seed: int
    sae_id: str
    run_id: str

    def neighbours(self) -> Ints:
        """[alive latent, other] places of the latents of nearest frequency among those alive, itself left out."""
        return neighbours(self.sums.active[self.alive], self.others)

    def active(self, pairs_feature: Ints) -> Floats:
        """[group, pair] active rows of each pair's latent."""
        return self.groups.active[:, pairs_feature]


@dataclass
class Rows:
    """Columns as they come."""

    parts: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        at: Router,
        metric: str,
        unit: str,
        feature: Ints,
        expert: Ints,
        value: Floats,
        *,
        n: Floats,
        low: Floats | None = None,
        high: Floats | None = None,
        null: Floats | None = None,
        null_kind: str | None = None,
    ) -> None:
        """One metric of many pairs; pairs whose value is none are left out."""
        kept = np.isfinite(value)
        self.parts.append(
            {
                "layer": at[0],
                "block": at[1],
                "metric": metric,
                "unit": unit,
                "feature": feature[kept],
                "expert": expert[kept],
                "value": value[kept],
                "n": n[kept].astype(np.int64),
                "ci_low": None if low is None else low[kept],
                "ci_high": None if high is None else high[kept],
                "null_value": None if null is None else null[kept],
                "null_kind": null_kind,
            }
        )

    def table(self, setting: Setting) -> pa.Table:
        """All of them, latents by their own numbers."""
        numbers = np.array(setting.subject.features, np.int64)
        tables = [_table(part, numbers, setting) for part in self.parts if len(part["feature"])]
        return pa.concat_tables(tables) if tables else pa.table({})


def _table(part: dict[str, Any], numbers: Ints, setting: Setting) -> pa.Table:
    size = len(part["feature"])

    def same(value: Any, kind: pa.DataType) -> pa.Array:
        return pa.array([value] * size, kind)

    def floats(name: str) -> pa.Array:
        found = part[name]
        return pa.nulls(size, pa.float64()) if found is None else pa.array(found, pa.float64(), from_pandas=True)

    return pa.table(
        {
            "sae_id": same(setting.sae_id, pa.string()),
            "run_id": same(setting.run_id, pa.string()),
            "feature": pa.array(numbers[part["feature"]], pa.int32()),
            "layer": same(part["layer"], pa.uint16()),
            "block": same(part["block"], pa.string()),
            "expert": pa.array(part["expert"], pa.int32()),
            "metric": same(part["metric"], pa.string()),
            "value": floats("value"),
            "ci_low": floats("ci_low"),
            "ci_high": floats("ci_high"),
            "null_value": floats("null_value"),
            "null_kind": same(part["null_kind"], pa.string()),
            "n": pa.array(part["n"], pa.int64()),
            "unit": same(part["unit"], pa.string()),
        }
    )


def kept_pairs(score: Floats, alive: Ints, top: int, strongest: int) -> tuple[Ints, Ints]:
    """Pairs to keep: each latent's `top` experts, each expert's latents, and all experts of the strongest latents.

    Args:
        score: [expert, feature], larger is stronger; NaN for none.
        alive: latents that count.
        top, strongest: how many.

    Returns:
        Places of the latents, and experts.

    Example:
        >>> feature, expert = kept_pairs(np.array([[3.0, 0.0], [1.0, 2.0]]), np.array([0, 1]), 1, 1)
        >>> sorted(zip(feature.tolist(), expert.tolist()))
        [(0, 0), (0, 1), (1, 0), (1, 1)]
    """
    shown = np.nan_to_num(score[:, alive], nan=-np.inf)
    keep = np.zeros(shown.shape, bool)
    np.put_along_axis(keep, np.argsort(-shown, axis=0, kind="stable")[:top], True, axis=0)
    np.put_along_axis(keep, np.argsort(-shown, axis=1, kind="stable")[:, :PER_EXPERT], True, axis=1)
    keep[:, np.argsort(-shown.max(0), kind="stable")[:strongest]] = True
    keep &= np.isfinite(shown)
    expert, place = np.nonzero(keep)
    return alive[place], expert


def neighbours(active: Floats, others: int) -> Ints:
    """[latent, other] the latents whose frequency is nearest by rank, itself left out; fewer where there are fewer.

    Example:
        >>> neighbours(np.array([5.0, 1.0, 4.0]), 1).tolist()
        [[2], [2], [0]]
    """
    count = len(active)
    most = min(others, count - 1)
    if most < 1:
        return np.zeros((count, 0), np.int64)
    order = np.argsort(active, kind="stable")
    rank = np.empty(count, np.int64)
    rank[order] = np.arange(count)
    first = np.clip(rank - most // 2, 0, count - 1 - most)
    window = first[:, None] + np.arange(most + 1)[None]
    around: Ints = np.array([row[row != own][:most] for row, own in zip(window, rank, strict=True)])
    found: Ints = order[around]
    return found
