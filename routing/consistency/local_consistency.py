"""Local consistency: how well one fixed set of experts serves a window of neighbouring tokens."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.routing.consistency.decisions import (
    missing_controls,
    numbers,
    parts_by_label,
    shuffles_for,
    spread,
    whole_run,
    without_repeats,
)
from moescope.routing.consistency.local_consistency_figure import draw
from moescope.routing.consistency.segment_performance import basic_interval, excess, performance
from moescope.routing.consistency.window_counts import Block, WindowCounts, window_counts
from moescope.routing.trace import Trace, read_trace
from moescope.store.run import Run

_COMPUTATION = "histograms of window counts (sliding, compiled), reverse cumulative sums, resamples of documents"
# Metric → attribute of `Performance`; control → name of the excess over it.
_METRICS = {
    "SRP": "srp",
    "relative size": "relative_size",
    "threshold": "threshold",
    "always-on F1": "always_on",
    "activation ratio": "activation_ratio",
}
_EXCESS = {
    "binomial": "excess over binomial",
    "null_shuffled": "excess over shuffled",
    "null_shuffled_in_label": "excess over shuffled in label",
    "null_shuffled_in_sequence": "excess over shuffled in sequence",
}


@analysis(
    name="local_consistency",
    needs=("routing",),
    source="arXiv 2505.16056 (segment routing best performance); excess over chance: moescope",
    section="consistency",
    order=10,
)
def local_consistency(
    run: Run,
    *,
    segment: Count = 16,
    segments: str | None = None,
    pool: Literal["model", "layer", "expert", "label"] = "model",
    shuffles: Natural = 5,
    draws: Count = 1000,
    seed: Natural = 0,
) -> Result:
    """How well does one fixed set of experts serve a window of neighbouring tokens?

    Segment routing best performance (SRP). Windows of m tokens slide one token at a time and never cross sequences. An expert
    chosen c times in a window is put in the window's set when c ≥ θ, for all its tokens. Seen as a prediction of which (token,
    expert) pairs are chosen, with TP = Σ c over sets, P = m · size of sets and A = Σ c over all, F1(θ) = 2·TP ÷ (P + A), and
    SRP = max F1(θ) over one θ for everything pooled: TP, P and A are summed over experts, layers and windows *before* the
    maximum, so the model's SRP is not the mean of its experts'. At ties the smallest θ counts; ρ̂ = P ÷ A at that θ is the size
    of the sets over the experts a token chooses. Weights play no part. Load alone gives an SRP above 0, so raw values of
    models with other k ÷ E must not be compared: read the excess (SRP − chance) ÷ (1 − chance).

    The authors' code keeps ranks of logits in 8 bits, which is wrong beyond 128 experts; decisions are used here.

    Args:
        segment: tokens in a window.
        segments: several lengths at once, as "4,16,64,256"; they take the place of `segment`.
        pool: what is summed before the maximum: the whole model, each layer, each expert, or each label's sequences.
        shuffles: how often tokens are shuffled for each control (in the run, within labels, within sequences); 0 for none.
        draws: bootstrap resamples of documents.
        seed: of shuffles and resamples.

    Example:
        >>> import tempfile, pathlib, pyarrow as pa
        >>> import moescope as ms
        >>> rows = {"sequence_id": [0] * 6, "position": range(6), "layer": [0] * 6}
        >>> ids = pa.table(rows | {"experts": [[0], [0], [1], [1], [0], [2]]})
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = store.import_trace(ids, name="tiny", n_experts=3)
        ...     ms.analyze(run, "local_consistency", segment=2).df().value[0].round(4)
        np.float64(0.7692)
    """
    trace = read_trace(run)
    wanted = numbers(segments, "segments") if segments else [segment]
    lengths = _possible(trace, wanted, "segments" if segments else "segment")
    parts = parts_by_label(trace) if pool == "label" else whole_run(trace)
    experts, repeats = without_repeats(trace)
    controls = shuffles_for(trace, shuffles)
    counts = [
        window_counts(trace, experts, parts, length, shuffles=controls, times=shuffles, seed=seed) for length in lengths
    ]
    counts = [one for one in counts if one.windows.sum()]
    if not counts:
        raise InputError(
            "no sequence with a label is as long as a window",
            expected=f"'segment' (or 'segments') below {min(lengths)}",
        )
    scored = [one.each_block(pool, partial(_scored, segment=one.segment, draws=draws, seed=seed)) for one in counts]
    frame = pd.concat([block for blocks in scored for block in blocks], ignore_index=True)
    shown = next((one for one in counts if one.segment == segment), counts[0])
    return Result(
        title=_title(frame[frame["segment"] == shown.segment], shown.segment, pool),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=draw,
        n=int(shown.windows.sum()),
        n_unit=f"windows of {shown.segment} tokens",
        definition="SRP = max over θ of 2·TP ÷ (P + A): a window's set holds the experts chosen at least θ times in it; TP and A "
        "count chosen (token, expert) pairs inside the sets and at all, P all pairs inside the sets, summed over what is "
        "pooled. Relative size ρ̂ = P ÷ A. Excess κ = (SRP − chance) ÷ (1 − chance).",
        units={
            "value": "SRP, always-on F1: F1 from 0 to 1; relative size: experts in a set ÷ experts a token chooses; threshold: "
            "tokens; activation ratio: share of pairs; excess: share of the way from chance to 1",
            "segment": "tokens",
            "n": "windows",
        },
        interval=f"95 % basic (reverse) bootstrap over documents, {draws} resamples; for the excess, chance held fixed",
        null="independent choices of k of E experts, all alike: counts are binomial (closed form)"
        + "".join(f"; {control.column}: {control.name}, mean of {shuffles}" for control in controls),
        computation=_COMPUTATION,
        notes=(
            *trace.notes,
            *repeats,
            *_left_out(trace, counts, wanted),
            *missing_controls(trace, shuffles),
            *_unlabelled(trace, pool),
            *_empty(counts),
            *(() if trace.n_documents > 1 else ("One document has no interval.",)),
        ),
    )


def _possible(trace: Trace, wanted: list[int], name: str) -> list[int]:
    longest = int(np.diff(trace.starts).max())
    lengths = [length for length in wanted if length <= longest]
    if not lengths:
        raise InputError(
            f"no sequence is as long as a window: {name} = {spread(wanted)} tokens",
            expected=f"at most {longest} tokens, the longest sequence",
            fix=f"ask for a shorter {name}, or record longer texts",
        )
    return lengths


def _scored(block: Block, *, segment: int, draws: int, seed: int) -> pd.DataFrame:
    """Rows of the table for the groups of a block."""
    found, null = performance(block.observed.sum(0)), performance(block.null)
    shuffled = {column: performance(values) for column, values in block.shuffled.items()}
    low, high = basic_interval(block.observed, draws=draws, seed=seed)
    parts = []
    for name, attribute in _METRICS.items():
        columns = {"value": getattr(found, attribute), "null": getattr(null, attribute)}
        columns |= {column: getattr(one, attribute).mean(0) for column, one in shuffled.items()}
        parts.append((name, columns | ({"ci_low": low, "ci_high": high} if name == "SRP" else {})))
    for name, chance in {"binomial": null.srp, **{c: s.srp.mean(0) for c, s in shuffled.items()}}.items():
        bounds = {"value": found.srp, "ci_low": low, "ci_high": high}
        columns = {column: excess(value, chance) for column, value in bounds.items()}
        parts.append((_EXCESS[name], columns | {"null": np.zeros(len(low))}))
    return pd.concat([_rows(block, segment, name, columns) for name, columns in parts], ignore_index=True)


def _rows(block: Block, segment: int, name: str, columns: dict[str, NDArray[np.float64]]) -> pd.DataFrame:
    order = ["value", "ci_low", "ci_high", "null", *block.shuffled]
    missing = np.full(block.observed.shape[1], np.nan)
    fields: dict[str, Any] = {**block.names, "segment": segment, "metric": name}
    fields |= {column: columns.get(column, missing) for column in order}
    return pd.DataFrame(fields | {"n": block.windows})


def _title(frame: pd.DataFrame, segment: int, pool: str) -> str:
    rows = frame[frame["metric"] == "SRP"].dropna(subset=["value"])
    if pool == "model":
        row = rows.iloc[0]
        size = frame.loc[frame["metric"] == "relative size", "value"].iloc[0]
        control, name = ("null", "chance")
        if "null_shuffled_in_sequence" in frame:
            control, name = "null_shuffled_in_sequence", "with each sequence's tokens shuffled"
        return (
            f"A fixed set of {size:.2f}× the chosen experts serves windows of {segment} tokens at F1 {row['value']:.3f}, "
            f"against {row['null']:.3f} by chance" + (f" and {row[control]:.3f} {name}" if control != "null" else "")
        )
    best, worst = (rows.loc[index] for index in (rows["value"].idxmax(), rows["value"].idxmin()))
    against = "null_shuffled" if "null_shuffled" in rows and pool == "expert" else "null"
    above = int((rows["ci_low"].fillna(rows["value"]) > rows[against]).sum())
    level = "chance" if against == "null" else "what their load alone gives"
    return (
        f"Local consistency over {segment} tokens (SRP) runs from {worst['value']:.3f} in {_place(worst)} to "
        f"{best['value']:.3f} in {_place(best)}; {above:,} of {len(rows):,} {pool}s lie above {level}"
    )


def _place(row: pd.Series[Any]) -> str:
    from moescope.routing.grid import layer_name

    if "label" in row:
        return str(row["label"])
    return layer_name(row["layer"], row["block"]) + (f"·E{row['expert']}" if "expert" in row else "")


def _left_out(trace: Trace, counts: list[WindowCounts], wanted: list[int]) -> tuple[str, ...]:
    lengths = np.diff(trace.starts)
    notes = []
    for one in counts:
        short = lengths < one.segment
        if short.any():
            notes.append(
                f"Windows of {one.segment} tokens leave out {short.sum():,} of {len(lengths):,} sequences, which are "
                f"shorter ({lengths[short].sum():,} of {trace.tokens:,} tokens)."
            )
    if none := [length for length in wanted if length not in {one.segment for one in counts}]:
        notes.append(f"No sequence has {spread(none)} tokens: windows that long are left out.")
    return tuple(notes)


def _unlabelled(trace: Trace, pool: str) -> tuple[str, ...]:
    unlabelled = int((trace.labels < 0).sum())
    return (f"{unlabelled:,} sequences without a label are left out.",) if pool == "label" and unlabelled else ()


def _empty(counts: list[WindowCounts]) -> tuple[str, ...]:
    return tuple(
        f"No sequence of {spread(map(repr, names))} has {one.segment} tokens."
        for one in counts
        if (names := [name for name, n in zip(one.parts.names, one.windows, strict=True) if not n and name])
    )
