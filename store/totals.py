"""Running reductions: one partial a batch, folded in batch order, so that every cut of a run gives the same sums."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Doubles = NDArray[np.float64]


@dataclass
class LoadPartial:
    """Load of one router under one label and phase in one batch: arrays by expert, all experts."""

    layer: int
    block: str
    label: str | None
    phase: str
    tokens: Ints
    weight_sum: Doubles

    @property
    def ids(self) -> Ints:
        """Expert of each place of the arrays."""
        return np.arange(len(self.tokens))

    @property
    def key(self) -> tuple[int, str, str | None, str]:
        """What is summed together."""
        return self.layer, self.block, self.label, self.phase

    def fold(self, later: LoadPartial) -> None:
        """Add the partial of a later batch."""
        self.tokens = self.tokens + later.tokens
        self.weight_sum = self.weight_sum + later.weight_sum


@dataclass
class ExpertPartial:
    """Reductions of one router's experts in one batch: arrays by expert, all experts.

    `max_abs_token` is the run-wide token, −1 where the expert was not chosen; on equal maxima the earlier token stays.
    `neurons` counts values of neurons seen, `active` and `zeros` those over the threshold and those exactly zero; all are 0
    where neurons cannot be seen. Where `shared`, the arrays are by shared expert, whose ids are −1, −2, ….
    """

    layer: int
    block: str
    tokens: Ints
    weight_sum: Doubles
    norm_sum: Doubles
    weighted_norm_sum: Doubles
    max_abs_out: NDArray[np.float32]
    max_abs_channel: Ints
    max_abs_token: Ints
    neurons: Ints
    active: Ints
    zeros: Ints
    shared: bool = False

    @property
    def key(self) -> tuple[int, str, bool]:
        """What is summed together."""
        return self.layer, self.block, self.shared

    @property
    def ids(self) -> Ints:
        """Expert of each place of the arrays."""
        places = np.arange(len(self.tokens))
        return -1 - places if self.shared else places

    def fold(self, later: ExpertPartial) -> None:
        """Add the partial of a later batch."""
        # A NaN wins over any number, and stays.
        larger = ~np.isnan(self.max_abs_out) & ~(later.max_abs_out <= self.max_abs_out)
        for name in ("tokens", "weight_sum", "norm_sum", "weighted_norm_sum", "neurons", "active", "zeros"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        for name in ("max_abs_out", "max_abs_channel", "max_abs_token"):
            setattr(self, name, np.where(larger, getattr(later, name), getattr(self, name)))


def load_rows(partials: Iterable[LoadPartial], extra: dict[str, int], *, only_used: bool) -> pa.Table | None:
    """Partials as rows of `loads` or `load_partials`; `extra` columns hold the same value in every row."""
    return _rows(
        list(partials), extra, {"label": pa.string(), "phase": pa.string()}, ("tokens", "weight_sum"), only_used
    )


def expert_rows(partials: Iterable[ExpertPartial], extra: dict[str, int], *, only_used: bool) -> pa.Table | None:
    """Partials as rows of `expert_partials`."""
    values = (
        "tokens",
        "weight_sum",
        "norm_sum",
        "weighted_norm_sum",
        "max_abs_out",
        "max_abs_channel",
        "max_abs_token",
        "neurons",
        "active",
        "zeros",
    )
    return _rows(list(partials), extra, {}, values, only_used)


def _rows(
    partials: list[Any], extra: dict[str, int], keys: dict[str, pa.DataType], values: tuple[str, ...], only_used: bool
) -> pa.Table | None:
    if not partials:
        return None
    kept = [np.flatnonzero(p.tokens) if only_used else np.arange(len(p.tokens)) for p in partials]
    of = pa.array(np.repeat(np.arange(len(partials)), [len(index) for index in kept]))

    def repeated(name: str, kind: pa.DataType) -> pa.Array:
        return pa.array([getattr(p, name) for p in partials], kind).take(of)

    columns = {name: pa.array(np.full(len(of), value)) for name, value in extra.items()}
    columns |= {"layer": repeated("layer", pa.uint16()), "block": repeated("block", pa.string())}
    columns |= {name: repeated(name, kind) for name, kind in keys.items()}
    columns["expert"] = pa.array(
        np.concatenate([p.ids[k] for p, k in zip(partials, kept, strict=True)]).astype(np.int32)
    )
    for name in values:
        columns[name] = pa.array(np.concatenate([getattr(p, name)[k] for p, k in zip(partials, kept, strict=True)]))
    return pa.table(columns)
