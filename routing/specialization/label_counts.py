"""How often every document chose every expert, with the documents' labels: what the analyses by label share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.core.statistics import document_weights
from moescope.routing.trace import Router, Trace, read_trace
from moescope.store.run import Run

Floats = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class LabelCounts:
    """Decisions of labelled documents.

    Attributes:
        trace: where they were read; its unlabelled documents take no part.
        names: [label].
        label: [document] index into `names`.
        tokens: [document].
        counts: for each router [document, expert] tokens that chose the expert.
    """

    trace: Trace
    names: tuple[str, ...]
    label: NDArray[np.int64]
    tokens: NDArray[np.float64]
    counts: tuple[NDArray[np.float64], ...]

    @property
    def routers(self) -> tuple[Router, ...]:
        """In the order of `counts`."""
        return self.trace.routers

    @property
    def member(self) -> NDArray[np.float64]:
        """[label, document] 1 where the document has the label."""
        member: NDArray[np.float64] = (self.label[None, :] == np.arange(len(self.names))[:, None]).astype(np.float64)
        return member

    def shuffled_members(self, draws: int, seed: int) -> Iterator[NDArray[np.float64]]:
        """`member` with the labels shuffled over documents, `draws` times."""
        generator = np.random.default_rng(seed)
        member = self.member
        for _ in range(draws):
            yield member[:, generator.permutation(len(self.label))]

    def shuffled_sums(self, values: Floats, draws: int, seed: int) -> NDArray[np.float64]:
        """[draw, label, ...] sums of `values` [document, ...] over the documents of a label, labels shuffled."""
        return np.stack([member @ values for member in self.shuffled_members(draws, seed)])

    def resampled_sums(self, values: Floats, draws: int, seed: int) -> NDArray[np.float64]:
        """[draw, label, ...] sums of `values` [document, ...] over documents drawn anew within each label."""
        sums = np.empty((draws, len(self.names), *values.shape[1:]))
        for number in range(len(self.names)):
            mine = np.flatnonzero(self.label == number)
            weights = document_weights(len(mine), draws=draws, seed=seed + number)
            sums[:, number] = np.tensordot(weights.astype(np.float64), values[mine], axes=1)
        return sums

    @property
    def resampling_moves(self) -> bool:
        """Whether some label has two documents, so that resampling can give another answer."""
        return bool((np.bincount(self.label) > 1).any())


def read_label_counts(run: Run) -> LabelCounts:
    """Count the decisions of every labelled document.

    Raises:
        InputError: fewer than two labels.
    """
    trace = read_trace(run)
    if len(trace.label_names) < 2:
        raise InputError(
            f"run {run.name!r} has fewer than two labels",
            found=f"{len(trace.label_names)}",
            fix='give documents a "label" (--label-field), and record again',
        )
    unit = np.where(trace.label >= 0, trace.document * len(trace.label_names) + trace.label, -1)
    units, row = np.unique(unit[unit >= 0], return_inverse=True)
    counts = [_counted(row, router.experts[unit >= 0], len(units), router.n_experts) for router in trace.routers]
    return LabelCounts(
        trace=trace,
        names=trace.label_names,
        label=(units % len(trace.label_names)).astype(np.int64),
        tokens=np.bincount(row, minlength=len(units)).astype(np.float64),
        counts=tuple(counts),
    )


def _counted(row: NDArray[np.intp], experts: NDArray[np.uint16], rows: int, n_experts: int) -> NDArray[np.float64]:
    """[row, expert] how often each expert stands in the decisions of a row's tokens."""
    cell = (row * n_experts)[:, None] + experts
    return np.bincount(cell.ravel(), minlength=rows * n_experts).reshape(rows, n_experts).astype(np.float64)
