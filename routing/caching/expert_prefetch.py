"""Prefetching: what a cache serves when expected experts are brought in before the token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.figures import CHANCE, SERIES
from moescope.core.result import Result
from moescope.core.statistics import bootstrap_ratio
from moescope.routing.caching.expert_bytes import bytes_of
from moescope.routing.caching.predictors import PREDICTOR_NAMES, PREDICTORS, Predictor, predicted_experts
from moescope.routing.caching.replay import in_parallel
from moescope.routing.caching.streams import Sequences, Stream, chosen_sequences, layer_streams, uses
from moescope.routing.trace import Trace, read_trace
from moescope.store.run import Run


@dataclass(frozen=True)
class Prefetched:
    """One layer under one predictor; all by row of `Sequences`.

    Attributes:
        hits: [row, size] uses found after prefetching.
        fetched: [row, size] experts brought in because they were expected.
        foreseen: [row] uses that were expected.
    """

    hits: NDArray[np.float64]
    fetched: NDArray[np.float64]
    foreseen: NDArray[np.float64]


@analysis(
    name="expert_prefetch",
    needs=("routing", "tokens", "sequences"),
    source="arXiv 2410.17954: predicted experts are prefetched, mistakes corrected on demand",
    section="caching",
    order=30,
)
def expert_prefetch(
    run: Run,
    *,
    predictor: Literal["all", "token", "previous_layer", "popularity"] = "all",
    width: Count | None = None,
    size: Count | None = None,
    expert_bytes: Count | None = None,
    draws: Count = 1000,
    seed: Natural = 0,
) -> Result:
    """How much more does a cache serve, and how much more is moved, if expected experts are brought in beforehand?

    Before each token a predictor names `width` experts of the layer; they are brought into an LRU cache (or moved to its top),
    the most expected last. Then the token's experts are tested, and those missing are brought in on demand. Tables are counted
    on half of the documents and used on the others: by token id, by the experts of the layer before, or by popularity alone.
    Caches are empty at the start of each sequence. Recall is the share of choices among those predicted.

    Prefetching hides transfers behind computing and saves none: read hit rate beside transfers.

    Args:
        predictor: what the expectation rests on; all of them by default.
        width: experts expected for each token; k where not given.
        size: the cache size the title speaks of; 2k where not given.
        expert_bytes: bytes of one expert; from the model's width, neurons and dtype where the run has them.
        draws: bootstrap resamples of documents.
        seed: of the split of documents and of the resampling.
    """
    trace = read_trace(run)
    streams = layer_streams(trace)
    chosen, notes = _predictors(run, trace, predictor)
    widest, largest = max(stream.width for stream in streams), max(stream.experts for stream in streams)
    expected = min(width or widest, largest)
    named = min(max(size or 2 * widest, expected), largest)
    calibration, sequences, evaluation, split = _split(trace, seed)
    held_out = [stream.at(evaluation) for stream in streams]
    nothing = np.empty((len(evaluation), 0), np.uint16)
    found = {"none": in_parallel([partial(_replay, stream, nothing, sequences) for stream in held_out])}
    for one in chosen:
        guess = partial(
            predicted_experts,
            trace,
            streams,
            predictor=one,
            calibration=calibration,
            evaluation=evaluation,
            width=expected,
        )
        found[one] = in_parallel(
            [partial(_foretold, guess, number, stream, sequences) for number, stream in enumerate(held_out)]
        )
    held, told = bytes_of(run, streams, expert_bytes)
    table = _table(held_out, sequences, found, expected, held, draws, seed)
    units = {
        "value": "share of choices",
        "null": "share of choices",
        "size": "experts a layer",
        "prefetched": "experts a token",
        "on_demand": "experts a token",
        "bytes": "bytes brought in a token",
    }
    return Result(
        title=_title(table, named, largest, chosen),
        table=table,
        draw=_draw,
        n=int(sum(uses(stream, sequences).sum() for stream in held_out)),
        n_unit="choices",
        definition=f"Hit rate: share of choices found in an LRU cache after the {expected} experts expected for the token were "
        "brought in; caches start empty at each sequence. Recall: share of choices among the expected.",
        units={column: unit for column, unit in units.items() if column in table.column_names},
        interval=f"95 % percentile bootstrap over documents, {draws} resamples",
        null="hit rate: the same LRU cache without prefetching; recall: expected experts ÷ experts, what guessing gives",
        computation="compiled replay; tables counted on the calibration documents",
        notes=(*trace.notes, split, *notes, *told),
    )


def _predictors(run: Run, trace: Trace, asked: str) -> tuple[tuple[Predictor, ...], list[str]]:
    chosen: tuple[Predictor, ...] = tuple(name for name in PREDICTORS if asked in ("all", name))
    if "token" in chosen and (trace.token_id < 0).all():
        if asked == "token":
            raise InputError(
                f"run {run.name!r} has no token ids to predict from",
                found="decisions without token ids, as imported",
                fix="import a trace that has token_id, or take predictor=previous_layer",
            )
        rest = tuple(name for name in chosen if name != "token")
        return rest, ["The run has no token ids, so the table by token id is left out."]
    return chosen, []


def _split(trace: Trace, seed: int) -> tuple[NDArray[np.int64], Sequences, NDArray[np.int64], str]:
    """Calibration tokens, evaluation sequences and tokens, and what a reader must know of the split."""
    documents = trace.n_documents
    if documents < 2:
        raise InputError(
            "prefetching needs documents to learn from and others to be tried on",
            expected="at least two documents",
            found="one",
            fix="record more texts, or look at expert_cache",
        )
    drawn = np.random.default_rng(seed).permutation(documents) < documents // 2
    calibration = np.flatnonzero(drawn[trace.document])
    sequences, evaluation = chosen_sequences(trace, ~drawn[trace.documents])
    note = f"Tables are counted on {drawn.sum():,} documents and used on the other {(~drawn).sum():,}."
    return calibration, sequences, evaluation, note


def _foretold(
    guess: Callable[[int], NDArray[np.uint16]], number: int, stream: Stream, sequences: Sequences
) -> Prefetched:
    return _replay(stream, guess(number), sequences)


def _replay(stream: Stream, guess: NDArray[np.uint16], sequences: Sequences) -> Prefetched:
    from moescope.routing.caching.predictor_kernels import foreseen
    from moescope.routing.caching.recency_kernel import recency_depths

    width = guess.shape[1]
    ids = np.concatenate([guess, stream.ids], axis=1)
    bounds = np.array([0, width, width + stream.width], np.int64)
    depths = np.zeros((sequences.rows, 2, stream.experts))
    weight = np.ones(len(sequences.row))
    recency_depths(ids, bounds, np.array([0, 1]), sequences.starts, sequences.row, weight, depths)
    inside = np.cumsum(depths, axis=2)
    asked = np.bincount(sequences.row, weights=np.diff(sequences.starts) * width, minlength=sequences.rows)
    right = np.zeros(sequences.rows)
    foreseen(guess, stream.ids, sequences.starts, sequences.row, stream.experts, right)
    return Prefetched(hits=inside[:, 1], fetched=asked[:, None] - inside[:, 0], foreseen=right)


def _table(
    streams: list[Stream],
    sequences: Sequences,
    found: dict[str, list[Prefetched]],
    width: int,
    held: list[float | None],
    draws: int,
    seed: int,
) -> pa.Table:
    """Rows of each predictor, layer and size from `width` up, of all layers together, and their recall."""
    largest = max(stream.experts for stream in streams)
    counted = [np.bincount(sequences.row, weights=uses(s, sequences), minlength=sequences.rows) for s in streams]
    used = np.stack(counted, axis=1).astype(np.float64)
    used = np.concatenate([used, used.sum(1, keepdims=True)], axis=1)
    plain = _stacked([part.hits for part in found["none"]], largest).sum(0) / used.sum(0)[:, None]
    frames = []
    for name, parts in found.items():
        rates = _hit_rows(streams, parts, used, plain, width, held, float(sequences.starts[-1]), draws, seed)
        recalls = [] if name == "none" else [_recall_rows(streams, parts, used, width, draws, seed)]
        frames += [frame.assign(predictor=name) for frame in (*rates, *recalls)]
    whole = pd.concat([frame.dropna(axis=1, how="all") for frame in frames], ignore_index=True)
    whole = whole.astype({"layer": "Int64", "size": "Int64"})
    columns = ["layer", "block", "predictor", "size", "metric", "value", "ci_low", "ci_high", "null", "prefetched"]
    columns += ["on_demand", "n"] if None in held else ["on_demand", "bytes", "n"]
    return pa.Table.from_pandas(whole.reindex(columns=columns), preserve_index=False)


def _hit_rows(
    streams: list[Stream],
    parts: list[Prefetched],
    used: NDArray[np.float64],
    plain: NDArray[np.float64],
    width: int,
    held: list[float | None],
    tokens: float,
    draws: int,
    seed: int,
) -> list[pd.DataFrame]:
    largest = plain.shape[1]
    hits = _stacked([part.hits for part in parts], largest)
    value, low, high = bootstrap_ratio(hits, used[:, :, None], draws=draws, seed=seed)
    fetched = _stacked([part.fetched for part in parts], largest).sum(0) / tokens
    missed = (used[:, :, None] - hits).sum(0) / tokens
    sizes_held = np.array([np.nan if size is None else size for size in held])
    sent = (fetched + missed)[:-1] * sizes_held[:, None]
    sent = np.concatenate([sent, sent.sum(0, keepdims=True)])
    frames = []
    for i, stream in enumerate([*streams, None]):
        most = stream.experts if stream else largest
        sizes = np.arange(min(width, most), most + 1)
        columns = {"value": value, "ci_low": low, "ci_high": high, "null": plain, "prefetched": fetched}
        columns |= {"on_demand": missed, "bytes": sent}
        frames.append(
            pd.DataFrame({"size": sizes, "metric": "hit rate", "n": int(used[:, i].sum())})
            .assign(layer=stream.layer if stream else None, block=stream.block if stream else None)
            .assign(**{column: part[i, sizes - 1] for column, part in columns.items()})
        )
    return frames


def _recall_rows(
    streams: list[Stream], parts: list[Prefetched], used: NDArray[np.float64], width: int, draws: int, seed: int
) -> pd.DataFrame:
    right = np.stack([part.foreseen for part in parts], axis=1)
    right = np.concatenate([right, right.sum(1, keepdims=True)], axis=1)
    value, low, high = bootstrap_ratio(right, used, draws=draws, seed=seed)
    guessed = np.array([min(width / stream.experts, 1.0) for stream in streams])
    overall = used[:, :-1].sum(0) @ guessed / used[:, -1].sum()
    return pd.DataFrame(
        {
            "layer": [*[stream.layer for stream in streams], None],
            "block": [*[stream.block for stream in streams], None],
            "metric": "recall",
            "value": value,
            "ci_low": low,
            "ci_high": high,
            "null": [*guessed, overall],
            "n": used.sum(0).astype(int),
        }
    )


def _stacked(parts: list[NDArray[np.float64]], largest: int) -> NDArray[np.float64]:
    """[row, stream + 1, size], the last of all streams together; a cache larger than a layer holds all of it."""
    padded = np.stack([np.pad(p, ((0, 0), (0, largest - p.shape[1])), mode="edge") for p in parts], axis=1)
    return np.concatenate([padded, padded.sum(1, keepdims=True)], axis=1)


def _title(table: pa.Table, named: int, largest: int, chosen: tuple[Predictor, ...]) -> str:
    frame = table.to_pandas()
    whole = frame[frame["layer"].isna()]
    served = whole[(whole["metric"] == "hit rate") & (whole["size"] == named)].set_index("predictor")
    best = max(chosen, key=lambda name: served["value"][name])
    recall = whole[(whole["metric"] == "recall") & (whole["predictor"] == best)]["value"].iloc[0]
    moved = served["prefetched"][best] + served["on_demand"][best]
    verb = "lifts" if served["value"][best] >= served["value"]["none"] else "lowers"
    return (
        f"Prefetching by {PREDICTOR_NAMES[best]} (recall {recall:.0%}) {verb} an LRU cache of {named} of {largest} experts a "
        f"layer from {served['value']['none']:.0%} to {served['value'][best]:.0%} of the choices, moving {moved:.3g} instead of "
        f"{served['on_demand']['none']:.3g} experts a token"
    )


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    whole = frame[frame["layer"].isna() & (frame["metric"] == "hit rate")]
    figure = go.Figure()
    for number, name in enumerate(name for name in PREDICTOR_NAMES if name in set(whole["predictor"])):
        part = whole[whole["predictor"] == name]
        line = {"color": CHANCE, "dash": "dash"} if name == "none" else {"color": SERIES[number]}
        figure.add_scatter(
            x=part["size"].astype(int),
            y=part["value"],
            mode="lines",
            name=PREDICTOR_NAMES[name],
            line=line,
            customdata=np.stack([part["ci_low"], part["ci_high"], part["prefetched"], part["on_demand"]], axis=-1),
            hovertemplate=f"{PREDICTOR_NAMES[name]}, %{{x}} experts: %{{y:.1%}} [%{{customdata[0]:.1%}}, %{{customdata[1]:.1%}}]"
            "<br>%{customdata[2]:.3g} prefetched and %{customdata[3]:.3g} on demand a token<extra></extra>",
        )
    figure.update_xaxes(title="size of the cache (experts a layer)")
    figure.update_yaxes(title="hit rate (share of choices)", range=[0, 1.02], tickformat=".0%")
    figure.update_layout(height=420)
    return figure
