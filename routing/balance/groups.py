"""Tokens by what a router's evenness or certainty may depend on: label, place in the sequence, phase."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.core.statistics import document_weights
from moescope.routing.trace import Trace

By = Literal["layer", "label", "position", "phase", "class"]
Floats = NDArray[np.float64]

# More documents than this are resampled in as many bundles of documents: the interval is the same, the cost is bounded.
MOST_UNITS = 1000

_CLASSES = """
    SELECT token, class::VARCHAR
    FROM tokens
    WHERE run_id = $run AND class IS NOT NULL
    ORDER BY token
"""


@dataclass(frozen=True)
class Grouping:
    """Tokens in named groups, and in cells: the tokens that one document (or bundle of documents) has in one group.

    Attributes:
        by: what the groups are; `layer` puts all tokens into one.
        names: of the groups that hold tokens.
        cell: [token] its cell; −1 for tokens in no group.
        group_of: [cell] index into `names`; ascending.
        bundled: whether documents were bundled.
    """

    by: By
    names: tuple[str, ...]
    cell: NDArray[np.int64]
    group_of: NDArray[np.int64]
    bundled: bool

    @property
    def column(self) -> str | None:
        """The table column that names the group; None where there is only one."""
        return None if self.by == "layer" else self.by

    @cached_property
    def tokens(self) -> NDArray[np.int64]:
        """[cell] how many tokens it holds."""
        return np.bincount(self.cell[self.cell >= 0], minlength=len(self.group_of))

    def cells(self) -> Iterator[tuple[str, slice]]:
        """Each group's name and its cells."""
        ends = np.searchsorted(self.group_of, np.arange(len(self.names) + 1))
        for number, name in enumerate(self.names):
            yield name, slice(int(ends[number]), int(ends[number + 1]))

    def sums(self, values: NDArray[Any], rows: NDArray[np.int64] | slice = slice(None)) -> Floats:
        """[cell, …] sums of values [token, …] over each cell's tokens; `rows` says which tokens the values belong to."""
        from scipy.sparse import csr_array

        cell = self.cell[rows]
        inside = np.flatnonzero(cell >= 0)
        shape = (len(self.group_of), len(cell))
        member = csr_array((np.ones(len(inside), values.dtype), (cell[inside], inside)), shape=shape)
        return np.asarray(member @ values, dtype=np.float64)

    def counts(self, experts: NDArray[np.integer[Any]], n_experts: int) -> Floats:
        """[cell, expert] decisions of each cell's tokens."""
        inside = self.cell >= 0
        chosen = experts if inside.all() else experts[inside]
        place = self.cell[inside, None] * n_experts + chosen
        found = np.bincount(place.ravel(), minlength=len(self.group_of) * n_experts)
        return found.reshape(-1, n_experts).astype(np.float64)

    def interval(self, draws: int) -> str:
        """What the intervals of a result are, in words."""
        bundles = f" ({MOST_UNITS:,} bundles of documents)" if self.bundled else ""
        return f"95 % basic bootstrap over documents{bundles}, {draws} resamples"


def grouped(trace: Trace, by: By, bins: int) -> Grouping:
    """Tokens of a trace in groups.

    Args:
        trace: the decisions.
        by: `label` of the document, `position` in the sequence (`bins` equal parts of each sequence), `phase` (prefill or
            decode), `class` of the token, or `layer` for all tokens together.
        bins: parts of a sequence, for `position`.

    Raises:
        InputError: `label`, and no document has one; `class`, and no token has one.
    """
    index, names = _groups(trace, by, bins)
    bundled = trace.n_documents > MOST_UNITS
    units = min(trace.n_documents, MOST_UNITS)
    key = index.astype(np.int64) * units + trace.document % units
    key[index < 0] = -1
    present = np.unique(key)
    present = present[present >= 0]
    cell = np.where(key >= 0, np.searchsorted(present, key), -1)
    used, group_of = np.unique(present // units, return_inverse=True)
    return Grouping(by, tuple(names[number] for number in used), cell, group_of, bundled)


def _groups(trace: Trace, by: By, bins: int) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    if by == "label":
        trace.require_labels()
        return trace.label, trace.label_names
    if by == "phase":
        return trace.decode.astype(np.int32), ("prefill", "decode")
    if by == "class":
        return _classes(trace)
    if by == "position":
        length = np.maximum.reduceat(trace.position, trace.starts[:-1]) + 1
        part = (trace.position.astype(np.int64) * bins) // length[trace.sequence]
        return part.astype(np.int32), tuple(f"{100 * i / bins:.3g}–{100 * (i + 1) / bins:.3g} %" for i in range(bins))
    return np.zeros(trace.tokens, np.int32), ("all",)


def _classes(trace: Trace) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    found = trace.run.sql(_CLASSES).to_arrow_table()
    if not found.num_rows:
        raise InputError(
            f"run {trace.run.name!r} has no classes of tokens",
            found="tokens without text, as imported",
            fix="record it from a live model with its tokenizer",
        )
    coded = found.column(1).combine_chunks().dictionary_encode()
    token, code = np.asarray(found.column(0)), np.asarray(coded.indices)
    names = coded.dictionary.to_pylist()
    order = sorted(range(len(names)), key=lambda number: str(names[number]))
    place = np.minimum(np.searchsorted(token, trace.token), len(token) - 1)
    index = np.where(token[place] == trace.token, np.argsort(order)[code[place]], -1)
    return index.astype(np.int32), tuple(str(names[number]) for number in order)


def basic_interval(estimate: Floats, resampled: Floats, *, low: Any = -np.inf, high: Any = np.inf) -> tuple[Any, Any]:
    """Basic 95 % bootstrap interval (Efron & Tibshirani 1993, ch. 13): twice the estimate minus the quantiles of resamples.

    Resampling adds unevenness to loads, so that quantiles of resampled measures of it lie too high; the basic interval
    turns that around.

    Args:
        estimate: any shape.
        resampled: [draws, …] the same.
        low, high: the range of the measure, to which bounds are cut.
    """
    lower, upper = np.quantile(resampled, [0.025, 0.975], axis=0)
    return np.clip(2 * estimate - upper, low, high), np.clip(2 * estimate - lower, low, high)


def resampled_sums(sums: Floats, *, draws: int, seed: int) -> Floats | None:
    """[draw, …] totals of [unit, …] when units are drawn with replacement; None for a single unit."""
    if len(sums) < 2:
        return None
    weights = document_weights(len(sums), draws=draws, seed=seed).astype(np.float64)
    found: Floats = np.tensordot(weights, sums, axes=1)
    return found
