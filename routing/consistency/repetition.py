"""Repetition: what a token's choice has in common with that of the token before it."""

from __future__ import annotations

from math import comb
from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.routing.consistency.control_figures import by_place, place_name
from moescope.routing.consistency.decisions import (
    Longs,
    Parts,
    by_token,
    chance,
    in_threads,
    missing_controls,
    parts_by_label,
    shuffle_seeds,
    shuffles_for,
    tokens_by_phase,
    whole_run,
    without_repeats,
)
from moescope.routing.consistency.ratios import Floats, Measured, Sums, tabled
from moescope.routing.trace import Router, Trace, read_trace
from moescope.store.run import Run

METRICS = ("first choice repeated", "any expert shared", "experts kept", "replacement rate", "Jaccard")


@analysis(
    name="repetition",
    needs=("routing",),
    source="Mixtral (arXiv 2401.04088, table 5): consecutive tokens; CoSMoEs: expert replacement rate",
    section="consistency",
    order=20,
)
def repetition(
    run: Run,
    *,
    by: Literal["layer", "label", "phase", "model"] = "layer",
    lag: Count = 1,
    shuffles: Natural = 5,
    draws: Count = 1000,
    seed: Natural = 0,
) -> Result:
    """How often does a token repeat the experts of the token before it, and how many must be replaced?

    Over pairs of tokens `lag` apart in one sequence, S the set of chosen experts and "first" the one with the largest weight:
    first choice repeated, share of pairs with the same first; any expert shared, share of pairs with S_t ∩ S_{t−lag} not
    empty; experts kept, mean of |S_t ∩ S_{t−lag}| ÷ k; replacement rate, mean of |S_t ∖ S_{t−lag}| ÷ k, one minus the former;
    Jaccard, mean of |∩| ÷ |∪|. A pair belongs to the phase of its later token.

    The chance level is that of independent balanced choices: 1/E; 1 − C(E−k, k)/C(E, k); k/E; 1 − k/E; the hypergeometric
    mean. It takes no account of uneven loads: the shuffles do.

    Args:
        by: each layer, each label, prefill against decode, or the whole model.
        lag: distance of the two tokens.
        shuffles: how often tokens are shuffled for each control; 0 for none.
        draws: bootstrap resamples of documents.
        seed: of shuffles and resamples.

    Example:
        >>> import tempfile, pathlib, pyarrow as pa
        >>> import moescope as ms
        >>> rows = {"sequence_id": [0] * 5, "position": range(5), "layer": [0] * 5}
        >>> ids = pa.table(rows | {"experts": [[0], [0], [1], [1], [0]]})
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = store.import_trace(ids, name="tiny", n_experts=4)
        ...     ms.analyze(run, "repetition").df().value[0]
        np.float64(0.5)
    """
    trace = read_trace(run)
    longest = int(np.diff(trace.starts).max())
    if longest <= lag:
        raise InputError(
            f"no sequence has two tokens {lag} apart: lag = {lag}", found=f"at most {longest} tokens a sequence"
        )
    parts = {"label": lambda: by_token(trace, parts_by_label(trace)), "phase": lambda: tokens_by_phase(trace)}.get(
        by, lambda: by_token(trace, whole_run(trace))
    )()
    measured, repeats = _measure(trace, parts, lag, shuffles, seed)
    frame = tabled(measured, trace, parts, by=by, draws=draws, seed=seed)
    pairs = int(np.maximum(np.diff(trace.starts) - lag, 0).sum())
    return Result(
        title=_title(frame, by, lag),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=pairs,
        n_unit="pairs of tokens",
        definition=f"Over pairs of tokens {lag} apart in a sequence, S the chosen experts: share with the same first choice, "
        "share with any expert in common, mean of |S ∩ S'| ÷ k (kept) and of |S ∖ S'| ÷ k (replaced), mean of |∩| ÷ |∪|.",
        units={
            "value": "share of pairs, or of a token's k experts",
            "null": "as value",
            "n": "pairs of tokens × routers",
        },
        interval=f"95 % percentile bootstrap over documents, {draws} resamples",
        null="independent choices of k of E experts, all alike: 1/E; 1 − C(E−k, k)/C(E, k); k/E; 1 − k/E; hypergeometric mean"
        + "".join(f"; {s.column}: {s.name}, mean of {shuffles}" for s in shuffles_for(trace, shuffles)),
        computation="counts of shared experts for each pair (compiled), ratios of sums over documents",
        notes=(
            *trace.notes,
            *repeats,
            *missing_controls(trace, shuffles),
            *_short(trace, lag),
            *_unweighted(trace),
        ),
    )


def _measure(trace: Trace, parts: Parts, lag: int, times: int, seed: int) -> tuple[Measured, tuple[str, ...]]:
    experts, repeats = without_repeats(trace)
    kept = np.diff(trace.starts) > lag
    orders = {
        shuffle.column: [shuffle.order(trace, kept, g) for g in shuffle_seeds(times, seed, lag)]
        for shuffle in shuffles_for(trace, times)
    }
    plain = np.arange(trace.tokens)

    def of_router(number: int) -> tuple[Sums, dict[str, Sums]]:
        router = trace.routers[number]

        def sums(order: Longs, rows: Longs, n_rows: int) -> Sums:
            return _sums(experts[number], router, order, trace, rows, n_rows, lag)

        shuffled = {
            column: [sums(order, parts.of_each, len(parts.names)) for order in listed]
            for column, listed in orders.items()
        }
        stacked = {c: Sums(np.stack([s.top for s in v]), np.stack([s.bottom for s in v])) for c, v in shuffled.items()}
        return sums(plain, parts.row, len(parts.part)), stacked

    found = in_threads(of_router, range(len(trace.routers)))
    observed = Sums(np.stack([one.top for one, _ in found], 1), np.stack([one.bottom for one, _ in found], 1))
    shuffled = {
        column: Sums(
            np.stack([other[column].top for _, other in found], 2),
            np.stack([other[column].bottom for _, other in found], 2),
        )
        for column in orders
    }
    bottom = np.stack([observed.bottom[parts.part == part].sum(0) for part in range(len(parts.names))])
    expected = np.stack([expected_by_chance(router) for router in trace.routers])
    pairs = np.repeat(bottom[..., :1], len(METRICS), -1)
    names = [{"metric": name} for name in METRICS]
    return Measured(names, observed, Sums(bottom * expected, bottom), shuffled, pairs), repeats


def _sums(experts: np.ndarray, router: Router, order: Longs, trace: Trace, rows: Longs, n_rows: int, lag: int) -> Sums:
    """[row, metric] of one router."""
    from moescope.routing.consistency.window_kernels import shared_histogram

    begins, lengths = trace.starts[:-1], np.diff(trace.starts)
    shared, same_first = shared_histogram(experts, order, begins, lengths, rows, n_rows, router.n_experts, lag)
    sizes, k = np.arange(router.top_k + 1), router.top_k
    pairs = shared.sum(1)
    common = shared @ sizes
    top = [same_first, pairs - shared[:, 0], common, pairs * k - common, shared @ (sizes / (2 * k - sizes))]
    bottom = [pairs, pairs, pairs * k, pairs * k, pairs]
    return Sums(np.stack(top, 1).astype(np.float64), np.stack(bottom, 1).astype(np.float64))


def expected_by_chance(router: Router) -> Floats:
    """[metric] expected where every token chooses k of E experts at random.

    Example:
        >>> mixtral = Router(0, "mlp", 8, 0, np.zeros((1, 2), np.uint16))
        >>> expected_by_chance(mixtral).round(3).tolist()[:4]
        [0.125, 0.464, 0.25, 0.75]
    """
    size, k = router.n_experts, router.top_k
    chances = np.array([comb(k, j) * comb(size - k, k - j) / comb(size, k) for j in range(k + 1)])
    sizes = np.arange(k + 1)
    kept = chance(router)
    return np.array([1 / size, 1 - chances[0], kept, 1 - kept, chances @ (sizes / (2 * k - sizes))])


def _short(trace: Trace, lag: int) -> tuple[str, ...]:
    lengths = np.diff(trace.starts)
    short = lengths <= lag
    text = f"{short.sum():,} of {len(lengths):,} sequences have no tokens {lag} apart and are left out."
    return (text,) if short.any() else ()


def _unweighted(trace: Trace) -> tuple[str, ...]:
    try:
        trace.require_weights()
    except InputError:
        return ("Decisions have no weights: the first choice is the expert that the trace names first.",)
    return ()


def _title(frame: pd.DataFrame, by: str, lag: int) -> str:
    first, kept = (frame[frame["metric"] == name].reset_index(drop=True) for name in (METRICS[0], METRICS[2]))
    share = np.average(kept["value"], weights=kept["n"])
    chances = np.average(kept["null"], weights=kept["n"])
    before = "the token before" if lag == 1 else f"the token {lag} before"
    text = f"A token keeps {share:.1%} of the experts of {before} (chance {chances:.1%})"
    if by == "model":
        return (
            f"{text} and repeats its first choice {first['value'][0]:.1%} of the time (chance {first['null'][0]:.1%})"
        )
    if len(kept) < 2:
        return text
    best, worst = kept.loc[kept["value"].idxmax()], kept.loc[kept["value"].idxmin()]
    return (
        f"{text}, from {worst['value']:.1%} in {place_name(worst, by)} to {best['value']:.1%} in {place_name(best, by)}"
    )


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    shown = [("experts kept", 0), ("first choice repeated", 1), ("any expert shared", 2)]
    figure = by_place(frame, [(name, colour, frame["metric"] == name) for name, colour in shown])
    figure.update_yaxes(title="share (of k experts, or of pairs)", rangemode="tozero", tickformat=".0%")
    return figure
