"""Specialization by what a token is: its class, or its place in the sequence, within documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.core.statistics import benjamini_hochberg, document_weights
from moescope.routing.grid import layer_name
from moescope.routing.specialization.preference_map import preference_map
from moescope.routing.specialization.token_groups import token_classes
from moescope.routing.trace import Router, Trace, read_trace
from moescope.store.run import Run

Floats = NDArray[np.float64]

_PLURAL = {"class": "classes", "position": "positions"}
# Cells of [document, group, expert] held at a time.
_CELLS = 4_000_000


@analysis(
    name="class_specialization",
    needs=("routing", "tokens"),
    source="arXiv 2402.01739 and arXiv 2401.15947: expert shares by kind of token",
    section="specialization",
    order=25,
)
def class_specialization(run: Run, *, draws: Count = 200, seed: Natural = 0) -> Result:
    """Which experts prefer which class of token (word, digit, punctuation, …), beyond the documents they stand in?

    For every expert and class: the share of the class's tokens that choose the expert (`value`). The null is the share that
    would come out if the classes were shuffled over the tokens of each document, which has a closed form, so that what a
    document is about counts for nothing; `over_null` is the ratio to it. Each document gives one difference from its own
    expectation; p is that of their sum if every sign were turned at random (normal limit, at least 2^−documents), and q
    controls the false-discovery rate over all pairs.

    Args:
        draws: bootstrap resamples of documents.
        seed: of the resampling.

    Raises:
        InputError: the run has no token classes.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world."], store, name="first", progress=False)
        ...     sorted(set(ms.analyze(run, "class_specialization").df()["metric"]))
        ["share of the class's tokens"]
    """
    trace = read_trace(run)
    codes, names = token_classes(trace)
    if not names:
        raise InputError(
            f"run {run.name!r} has no token classes",
            found="tokens without a class, as imported",
            fix="record from a live model with a tokenizer",
        )
    return _result(trace, codes, names, "class", draws=draws, seed=seed)


@analysis(
    name="position_specialization",
    needs=("routing", "tokens"),
    source="arXiv 2402.01739: expert shares by position",
    section="specialization",
    order=27,
)
def position_specialization(run: Run, *, draws: Count = 200, seed: Natural = 0) -> Result:
    """Which experts prefer which positions of a sequence, beyond the documents they stand in?

    Positions are grouped by powers of two: 0, 1, 2–3, 4–7, and so on, so the first token, where attention sinks lie, stands
    by itself. Share, null, p and q are those of `class_specialization`: the null shuffles positions within each document.

    Args:
        draws: bootstrap resamples of documents.
        seed: of the resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world."], store, name="first", progress=False)
        ...     ms.analyze(run, "position_specialization").df()["position"].unique().tolist()[:2]
        ['0', '1']
    """
    trace = read_trace(run)
    power = np.where(trace.position > 0, np.floor(np.log2(np.maximum(trace.position, 1))) + 1, 0).astype(np.int32)
    names = tuple(_span(number) for number in range(int(power.max()) + 1))
    return _result(trace, power, names, "position", draws=draws, seed=seed)


def _span(number: int) -> str:
    """Positions of the group with that number: 0, 1, 2–3, 4–7, …."""
    first, last = (0, 0) if number == 0 else (2 ** (number - 1), 2**number - 1)
    return f"{first}" if first == last else f"{first}–{last}"


@dataclass(frozen=True)
class _Sums:
    """[group, expert] tokens that chose the expert, as many expected within documents, p, and [group, expert] bounds."""

    counts: Floats
    expected: Floats
    p: Floats
    low: Floats
    high: Floats


def _result(
    trace: Trace, codes: NDArray[np.int32], names: tuple[str, ...], kind: str, *, draws: int, seed: int
) -> Result:
    """The answer for tokens grouped by `codes` [token], −1 for none."""
    kept = codes >= 0
    sizes = np.bincount(codes[kept], minlength=len(names))
    frames = []
    for router in trace.routers:
        sums = _sums(trace, router, np.flatnonzero(kept), codes, len(names), draws=draws, seed=seed)
        frames.append(_rows(router, sums, sizes, names, kind))
    frame = pd.concat(frames, ignore_index=True)
    frame["q"] = benjamini_hochberg(frame["p"].to_numpy())
    frame = frame.sort_values(["q", "over_null"], ascending=[True, False], kind="stable")
    return Result(
        title=_title(frame, kind),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw_classes if kind == "class" else _draw_positions,
        n=int(kept.sum()),
        n_unit="tokens",
        definition=f"Share of a {kind}'s tokens that choose the expert; over_null is that share over the share expected from "
        "the documents the tokens stand in.",
        units={
            "value": "share of tokens",
            "null": "share of tokens",
            "over_null": "ratio",
            "p": "probability",
            "q": "false-discovery rate",
            "n": "tokens",
        },
        interval=f"95 % percentile bootstrap over documents, {draws} resamples",
        null=f"share when {_PLURAL[kind]} are shuffled within each document (closed form); p from random signs of the "
        "documents' differences",
        computation="decisions counted for each document, group and expert",
        notes=trace.notes,
    )


def _sums(
    trace: Trace,
    router: Router,
    kept: NDArray[np.int64],
    codes: NDArray[np.int32],
    groups: int,
    *,
    draws: int,
    seed: int,
) -> _Sums:
    """Everything about one router, documents taken some at a time."""
    documents, size = trace.n_documents, router.n_experts
    weights = document_weights(documents, draws=draws, seed=seed).astype(np.float64)
    order = kept[np.argsort(trace.document[kept], kind="stable")]
    bounds = np.searchsorted(trace.document[order], np.arange(documents + 1))
    counts, expected = np.zeros((groups, size)), np.zeros((groups, size))
    squares, moving = np.zeros((groups, size)), np.zeros((groups, size))
    drawn, tokens = np.zeros((draws, groups, size)), np.zeros((draws, groups))
    step = max(_CELLS // (groups * size), 1)
    for first in range(0, documents, step):
        last = min(first + step, documents)
        rows = order[bounds[first] : bounds[last]]
        unit = (trace.document[rows].astype(np.int64) - first) * groups + codes[rows]
        cell = (unit * size)[:, None] + router.experts[rows]
        shape = (last - first, groups, size)
        found = np.bincount(cell.ravel(), minlength=int(np.prod(shape))).reshape(shape).astype(np.float64)
        of_group = np.bincount(unit, minlength=shape[0] * groups).reshape(shape[:2]).astype(np.float64)
        total = np.maximum(of_group.sum(1), 1)[:, None, None]
        chance = of_group[:, :, None] * found.sum(1)[:, None, :] / total
        counts += found.sum(0)
        expected += chance.sum(0)
        squares += ((found - chance) ** 2).sum(0)
        moving += (np.abs(found - chance) > 1e-12).sum(0)
        drawn += np.tensordot(weights[:, first:last], found, axes=1)
        tokens += weights[:, first:last] @ of_group
    p = _of_random_signs(counts - expected, squares, moving)
    return _Sums(counts, expected, p, *_quantiles(drawn, tokens[:, :, None], documents))


def _of_random_signs(total: Floats, squares: Floats, moving: Floats) -> Floats:
    """Chance that a sum of differences with random signs reaches `total`: normal, but never below all signs alike."""
    from scipy.special import ndtr

    z = np.divide(total, np.sqrt(squares), out=np.zeros_like(total), where=squares > 0)
    p: Floats = np.maximum(ndtr(-z), 0.5**moving)
    return np.where(moving > 0, p, 1.0)


def _quantiles(numerator: Floats, denominator: Floats, documents: int) -> tuple[Floats, Floats]:
    """Bounds of the resampled shares [draw, group, expert]; draws without a token of the group do not count."""
    low, high = (np.full(numerator.shape[1:], np.nan) for _ in range(2))
    if documents < 2:
        return low, high
    for group in range(numerator.shape[1]):
        drawn = denominator[:, group, 0] > 0
        if drawn.any():
            share = numerator[drawn, group] / denominator[drawn, group]
            low[group], high[group] = np.quantile(share, (0.025, 0.975), axis=0)
    return low, high


def _rows(router: Router, sums: _Sums, sizes: NDArray[Any], names: tuple[str, ...], kind: str) -> pd.DataFrame:
    """One row an expert and group that has tokens."""
    rank, expert = np.nonzero(np.broadcast_to(sizes[:, None] > 0, sums.counts.shape))
    tokens = sizes[rank]
    null = sums.expected[rank, expert] / tokens
    value = sums.counts[rank, expert] / tokens
    return pd.DataFrame(
        {
            "layer": router.layer,
            "block": router.block,
            "expert": expert,
            kind: np.array(names, dtype=object)[rank],
            "rank": rank,
            "metric": f"share of the {kind}'s tokens",
            "value": value,
            "ci_low": sums.low[rank, expert],
            "ci_high": sums.high[rank, expert],
            "null": null,
            "over_null": np.divide(value, null, out=np.ones_like(value), where=null > 0),
            "p": sums.p[rank, expert],
            "n": tokens.astype(np.int64),
        }
    )


def _title(frame: pd.DataFrame, kind: str) -> str:
    found = frame[(frame["q"] < 0.05) & (frame["over_null"] > 1)]
    if found.empty:
        return f"No expert prefers a {kind} beyond what its documents give (q < 0.05)"
    common = found[found["value"] >= frame["value"].mean()]
    best = (found if common.empty else common).sort_values("over_null", ascending=False).iloc[0]
    named = f"{best[kind]} tokens" if kind == "class" else f"tokens at position {best[kind]}"
    return (
        f"{len(found):,} of {len(frame):,} expert–{kind} pairs are specialized (q < 0.05); strongest: "
        f"{layer_name(best['layer'], best['block'])}·E{best['expert']} takes {best['value']:.0%} of {named}, "
        f"{best['over_null']:.1f}× what their documents give"
    )


def _draw_classes(result: Result) -> go.Figure:
    return preference_map(result.df(), group="class", ratio="over_null", null_name="classes shuffled within documents")


def _draw_positions(result: Result) -> go.Figure:
    return preference_map(
        result.df(), group="position", ratio="over_null", null_name="positions shuffled within documents"
    )
