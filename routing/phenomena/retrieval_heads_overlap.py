"""Two rankings of the same heads held against each other: retrieval and induction, short and long contexts, base and edited."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.figures import CHANCE, SERIES, plain
from moescope.core.result import Result
from moescope.core.statistics import document_weights
from moescope.routing.importance.rank_correlation import spearman
from moescope.routing.phenomena.head_records import HEADS_SQL, HeadRecord, condition_of, head_name, needed_record
from moescope.store.run import Run

Values = NDArray[np.float64]
_PROTOCOL = "the protocol that measures it, in moescope.probes.phenomena, or moescope phenomena MODEL"


@analysis(
    name="head_overlap",
    runs=2,
    needs=("head_sequences",),
    source="arXiv 2404.15574 (rank correlation of retrieval scores); arXiv 2407.15891 (induction heads for retrieval heads)",
    section="comparison",
    order=60,
)
def head_overlap(
    run: Run,
    other: Run,
    *,
    metric: str = "retrieval score",
    other_metric: str | None = None,
    top: Count = 20,
    draws: Count = 500,
    seed: Natural = 0,
) -> Result:
    """Do the same heads lead by two measures, or by one measure in two runs?

    Spearman's rank correlation over all heads, and the Jaccard overlap (shared ÷ either) of the `top` heads of each. So retrieval
    heads can be held against induction heads (`other_metric="induction"`), short against long contexts, a base model against its
    long-context continuation. The chance level is that of heads shuffled over the whole model: 0 for the correlation; for the
    overlap the mean over as many shuffles as there are resamples.

    Args:
        metric: of the first run.
        other_metric: of the other; None for the same.
        top: heads of each ranking, ties by layer and head.
        draws: bootstrap resamples of sequences, of each run by itself.
        seed: of resampling and shuffling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> from moescope.probes.phenomena.induction import induction_heads
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     found = induction_heads(ms.load("demo"), segment=16, repeats=2, draws=2, store=store)
        ...     result = ms.analyze([found.run, found.run], "head_overlap", metric="induction", other_metric="echo")
        ...     result.df()["metric"].tolist()[:2]
        ['rank correlation', 'overlap of the top 20']
    """
    one = needed_record(run, metric, protocol=_PROTOCOL)
    two = needed_record(other, other_metric or metric, protocol=_PROTOCOL)
    if not one.heads.equals(two.heads):
        raise InputError(
            "these runs are not of the same heads",
            expected="two runs of one architecture",
            found=f"{len(one.heads)} heads and {len(two.heads)}",
        )
    top = min(top, len(one.heads))
    random = np.random.default_rng(seed)
    pairs = [(a, b) for a, b in zip(_drawn(one, draws, seed), _drawn(two, draws, seed + 1), strict=True)]
    shuffles = [jaccard(random.permutation(one.value), two.value, top) for _ in range(draws)]
    measures: list[tuple[str, Callable[[Values, Values], float], float]] = [
        ("rank correlation", correlation, 0.0),
        (f"overlap of the top {top}", partial(jaccard, top=top), float(np.mean(shuffles))),
    ]
    rows: list[dict[str, Any]] = []
    for name, found, null in measures:
        again = [value for value in (found(a, b) for a, b in pairs) if np.isfinite(value)]
        several = min(one.documents, two.documents) > 1 and again
        low, high = np.percentile(again, [2.5, 97.5]) if several else (np.nan, np.nan)
        rows.append(
            {
                "metric": name,
                "value": found(one.value, two.value),
                "ci_low": low,
                "ci_high": high,
                "null": null,
                "n": len(one.heads),
            }
        )
    heads = one.heads.assign(metric="score", value=one.value, other=two.value, n=one.documents)
    for column, values in (("in_top", one.value), ("in_other_top", two.value)):
        heads[column] = np.isin(np.arange(len(heads)), leaders(values, top))
    frame = pd.concat([pd.DataFrame(rows), heads], ignore_index=True)
    for name in ("layer", "head", "n"):
        frame[name] = frame[name].astype("Int64")
    for name in ("in_top", "in_other_top"):
        frame[name] = frame[name].astype("boolean")
    labels = [f"{metric}, {run.name}", f"{other_metric or metric}, {other.name}"]
    frame["of"] = [*[None] * len(rows), *[" | ".join(labels)] * len(heads)]
    return Result(
        title=_title(rows, metric, other_metric or metric),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=draw_overlap,
        n=len(one.heads),
        n_unit="heads",
        definition="rank correlation: Spearman's ρ over all heads; overlap: heads in both tops ÷ heads in either; score rows: a head's "
        "value in the first run, and in the other (column other).",
        units={"value": "ρ, share, or score", "other": "score"},
        interval=f"95 % percentile bootstrap over sequences of each run, {draws} resamples",
        null="heads of one ranking shuffled over the whole model",
        sql=HEADS_SQL,
        sql_parameters={"run": run.run_id, "metric": metric, "condition": condition_of(run, metric)},
        computation="means over sequences of the query's rows for either run; correlation, overlap, bootstrap, shuffles",
    )


def correlation(one: Values, two: Values) -> float:
    """Spearman's ρ; NaN where a ranking has nothing but ties.

    Example:
        >>> correlation(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 9.0]))
        1.0
    """
    return float(spearman(np.stack([one, two]))[0, 1])


def leaders(values: NDArray[np.float64], top: int) -> NDArray[np.int64]:
    """The heads with the largest values, ties by their order."""
    found: NDArray[np.int64] = np.argsort(-values, kind="stable")[:top]
    return found


def jaccard(one: NDArray[np.float64], two: NDArray[np.float64], top: int) -> float:
    """Heads in both tops over heads in either.

    Example:
        >>> jaccard(np.array([3.0, 2.0, 1.0]), np.array([1.0, 3.0, 2.0]), 2)
        0.3333333333333333
    """
    a, b = set(leaders(one, top).tolist()), set(leaders(two, top).tolist())
    return len(a & b) / len(a | b)


def _drawn(record: HeadRecord, draws: int, seed: int) -> NDArray[np.float64]:
    """[draw, head] means over resampled sequences."""
    weights = document_weights(record.documents, draws=draws, seed=seed).astype(np.float64)
    means: NDArray[np.float64] = (weights @ record.sums) / np.maximum(weights @ record.n, 1)
    return means


def draw_overlap(result: Result) -> go.Figure:
    """A point a head: its value in the first run, and in the other; the tops of each marked."""
    frame = result.df()
    heads = frame[frame["head"].notna()]
    x_name, _, y_name = str(heads["of"].iloc[0]).partition(" | ")
    figure = go.Figure()
    both = heads["in_top"].astype(bool) & heads["in_other_top"].astype(bool)
    either = (heads["in_top"].astype(bool) | heads["in_other_top"].astype(bool)) & ~both
    for name, part, colour in (
        ("other heads", heads[~both & ~either], CHANCE),
        ("in one top", heads[either], SERIES[5]),
        ("in both tops", heads[both], SERIES[1]),
    ):
        names = [head_name(int(r.layer), str(r.block), int(r.head)) for r in part.itertuples()]
        figure.add_scatter(
            x=part["value"], y=part["other"], mode="markers", name=name, text=names, marker={"color": colour, "size": 8},
            hovertemplate="%{text}: %{x:.3g}, %{y:.3g}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title=plain(x_name))
    figure.update_yaxes(title=plain(y_name))
    figure.update_layout(height=440)
    return figure


def _title(rows: list[dict[str, Any]], metric: str, other: str) -> str:
    ranks, overlap = rows
    words = f"{metric} and {other}" if metric != other else metric
    where = "" if metric != other else " in two runs"
    return (
        f"Heads ranked by {words}{where} agree with ρ = {ranks['value']:.2f} [{ranks['ci_low']:.2f}, "
        f"{ranks['ci_high']:.2f}]; {overlap['metric']}: {overlap['value']:.0%}, by chance {overlap['null']:.0%}"
    )
