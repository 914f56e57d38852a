"""Attention sinks: which of the first positions draw attention without need, in how many heads, and how much."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.core.statistics import bootstrap_ratio
from moescope.routing.phenomena.attention_figures import draw_sinks
from moescope.routing.phenomena.attention_records import (
    HEADS_SQL,
    POSITIONS,
    WINDOW,
    HeadSums,
    head_sums,
    uniform_alpha,
)
from moescope.store.run import Run

_SHORTEST = 2 * POSITIONS
_COLUMNS = (
    "metric", "layer", "block", "head", "position", "value", "ci_low", "ci_high", "null", "sink", "rate", "texts", "n",
)  # fmt: skip


@analysis(
    name="attention_sinks",
    needs=("head_sequences", "sequences"),
    source="arXiv 2410.10781: α_k and Sink_k^ε, ε = 0.3, first 64 tokens",
    section="phenomena",
    order=30,
)
def attention_sinks(
    run: Run, *, epsilon: float = 0.3, shorter: bool = False, draws: Count = 500, seed: Natural = 0
) -> Result:
    """Which of the first positions are attention sinks, in how many heads, and how strong?

    α_k of a head in a text is the mean over the queries i ≥ k among its first 64 tokens of the attention that position k
    gets. Sink_k^ε is the share of (text, head) pairs with α_k > ε, over all layers and heads; positions count from 0
    (Sink_1 in the paper is position 0). Only the first ten positions are looked at: a column near the end of the 64 is so
    short that a head which attends to its own position, and to no sink at all, would pass there. Attention that goes
    to a logit of the softmax's own belongs to no position; the analysis `attention_classes` tells it.

    Args:
        epsilon: α over this counts as a sink, between 0 and 1.
        shorter: take texts of 20 to 63 tokens as well, each over all it has; otherwise they are left out.
        draws: bootstrap resamples of documents.
        seed: of resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     texts = ["A text of some length, " * 16]
        ...     run = ms.record(ms.load("demo"), texts, store, name="a", probes=["attention"], progress=False)
        ...     len(ms.analyze(run, "attention_sinks").df().query("metric == 'Sink_k'"))
        10
    """
    if not 0 < epsilon < 1:
        raise InputError("epsilon is a share of attention", expected="more than 0, less than 1", found=f"{epsilon:g}")
    found = head_sums(run, [f"sink_alpha_{k}" for k in range(POSITIONS)])
    by_position = {k: [_long_enough(h, k, shorter) for h in found.get(f"sink_alpha_{k}", [])] for k in range(POSITIONS)}
    if not found:
        raise InputError(
            f"run {run.name!r} has no statistics of sinks",
            expected="records of the probe attention",
            fix="record with the probe attention (--probe attention)",
        )
    texts = max((len(h.n) for parts in by_position.values() for h in parts), default=0)
    if not texts:
        raise _too_short(run, shorter)
    rates, alphas = [], []
    for k, parts in by_position.items():
        rates += _rates(parts, k, epsilon, draws, seed)
        alphas += [_alphas(heads, k, epsilon, draws, seed) for heads in parts]
    frame = pd.concat([pd.DataFrame(rates), *alphas], ignore_index=True).reindex(columns=list(_COLUMNS))
    for name in ("layer", "head", "position", "texts", "n"):
        frame[name] = frame[name].astype("Int64")
    frame["sink"] = frame["sink"].astype("boolean")
    total = len(set(head_sequences_of(found)))
    notes = [f"{texts:,} of {total:,} texts have {_SHORTEST if shorter else WINDOW} tokens or more and count."]
    if (left_out := (run.info["summary"] or {}).get("attention_left_out")) is not None:
        notes.append(f"Left out: {_told(left_out)}.")
    return Result(
        title=_title(frame, epsilon),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=draw_sinks,
        n=int(frame.loc[(frame["metric"] == "Sink_k") & (frame["position"] == 0), "n"].iloc[0]),
        n_unit="text × head pairs",
        definition=f"α_k: mean over the queries i ≥ k among a text's first {WINDOW} tokens of the attention that position k gets. "
        f"Sink_k: share of (text, head) pairs with α_k > {epsilon:g}, over all layers, or in one layer; alpha: mean α_k of a head over "
        "texts, with the share of texts where it passes (rate). Positions count from 0; the first ten only.",
        units={
            "value[Sink_k]": "share of text × head pairs",
            "value[Sink_k of layer]": "share of text × head pairs",
            "value[alpha]": "share of attention",
            "null": "the same under uniform attention",
            "rate": "share of texts",
        },
        interval=f"95 % percentile bootstrap over documents, {draws} resamples",
        null="uniform attention over all earlier positions: α_k = (H_W − H_k) ÷ (W − k), H being harmonic numbers and W the 64 tokens, "
        "or all that a shorter text has; the mean over texts",
        sql=HEADS_SQL,
        sql_parameters={
            "run": run.run_id,
            "condition": "base",
            "metrics": [f"sink_alpha_{k}" for k in range(POSITIONS)],
        },
        computation="sums ÷ n of each text and head, held against epsilon; means over texts and heads",
        notes=tuple(notes),
    )


def head_sequences_of(found: dict[str, list[HeadSums]]) -> list[int]:
    """Texts of which anything was recorded."""
    return sorted({int(s) for parts in found.values() for h in parts for s in h.sequence})


def _long_enough(heads: HeadSums, position: int, shorter: bool) -> HeadSums:
    """The texts whose window is whole; with `shorter`, those that are long enough to tell a sink."""
    return heads.of(heads.n + position >= (_SHORTEST if shorter else WINDOW))


def _rates(parts: list[HeadSums], position: int, epsilon: float, draws: int, seed: int) -> list[dict[str, object]]:
    """Sink_k over all layers, and of each."""
    each = [(heads, (heads.means > epsilon).sum(axis=1), np.full(len(heads.n), heads.sums.shape[1])) for heads in parts]
    rows = []
    for heads, passed, pairs in each:
        numbers = _interval(heads, passed, pairs, draws, seed)
        rows.append({"metric": "Sink_k of layer", "layer": heads.layer, "block": heads.block, **numbers})
    first = max(parts, key=lambda heads: len(heads.n))  # texts are the same in every layer
    same = [(passed, pairs) for heads, passed, pairs in each if np.array_equal(heads.sequence, first.sequence)]
    whole = _interval(first, sum(p for p, _ in same), sum(n for _, n in same), draws, seed)
    rows.insert(0, {"metric": "Sink_k", **whole})
    null = float((_uniform(first, position) > epsilon).mean())
    return [{**row, "position": position, "null": null} for row in rows]


def _interval(
    heads: HeadSums, passed: NDArray[np.int64] | int, pairs: NDArray[np.int64] | int, draws: int, seed: int
) -> dict[str, object]:
    numerator, denominator = (heads.by_document(np.asarray(a, np.float64)) for a in (passed, pairs))
    value, low, high = bootstrap_ratio(numerator, denominator, draws=draws, seed=seed)
    numbers = {"value": float(value), "ci_low": float(low), "ci_high": float(high)}
    return {**numbers, "texts": len(heads.n), "n": int(denominator.sum())}


def _alphas(heads: HeadSums, position: int, epsilon: float, draws: int, seed: int) -> pd.DataFrame:
    """Mean α_k of every head over texts."""
    means = heads.means
    ones = np.ones((len(means), 1))
    value, low, high = bootstrap_ratio(heads.by_document(means), heads.by_document(ones), draws=draws, seed=seed)
    return pd.DataFrame(
        {
            "metric": "alpha", "layer": heads.layer, "block": heads.block, "head": range(means.shape[1]), "position": position,
            "value": value, "ci_low": low, "ci_high": high, "null": _uniform(heads, position).mean(), "sink": value > epsilon,
            "rate": (means > epsilon).mean(axis=0), "texts": len(means), "n": int(heads.n.sum()),
        }
    )  # fmt: skip


def _uniform(heads: HeadSums, position: int) -> NDArray[np.float64]:
    """[text] α_k under uniform attention, in each text's own window; in one of 64 tokens where there is no text."""
    windows = heads.n + position if len(heads.n) else [WINDOW]
    return np.array([uniform_alpha(position, int(window)) for window in windows], np.float64)


def _too_short(run: Run, shorter: bool) -> InputError:
    least = _SHORTEST if shorter else WINDOW
    return InputError(
        f"no text of run {run.name!r} is long enough to tell a sink",
        expected=f"texts of at least {least} tokens, recorded with the probe attention",
        fix="record longer texts"
        if shorter
        else f"record longer texts, or take those of {_SHORTEST} tokens too (shorter=true)",
    )


def _title(frame: pd.DataFrame, epsilon: float) -> str:
    rates = frame[frame["metric"] == "Sink_k"].set_index("position")
    alphas = frame[frame["metric"] == "alpha"]
    top = alphas.loc[alphas["value"].idxmax()]
    strongest = (
        f"L{top['layer']}{'' if top['block'] == 'attn' else ' ' + str(top['block'])} head {top['head']} gives position "
        f"{top['position']} {top['value']:.1%} of its attention"
    )
    if not (rates["value"] > 0).any():
        return f"No attention sink among the first {POSITIONS} positions at ε = {epsilon:g}; the nearest: {strongest}"
    best = rates["value"].idxmax()
    row = rates.loc[best]
    between = "" if pd.isna(row["ci_low"]) else f" [{row['ci_low']:.1%}, {row['ci_high']:.1%}]"
    place = "The first token" if best == 0 else f"Position {best}"
    return f"{place} is an attention sink in {row['value']:.1%}{between} of (text, head) pairs; {strongest}"


def _told(left_out: dict[str, str]) -> str:
    reasons: dict[str, int] = {}
    for reason in left_out.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    return "; ".join(f"{count} layer{'s' * (count > 1)} ({reason})" for reason, count in reasons.items())
