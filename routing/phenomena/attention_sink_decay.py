"""Sink decay: how much of the attention that the first token draws is gone in another run of the same texts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.core.statistics import document_weights
from moescope.routing.phenomena.attention_figures import draw_decay
from moescope.routing.phenomena.attention_records import HEADS_SQL, HeadSums, head_sums
from moescope.store.run import Run

_METRIC = "mass_first"
_COLUMNS = ("metric", "layer", "block", "head", "value", "ci_low", "ci_high", "null", "before", "after", "texts", "n")


@analysis(
    name="sink_decay",
    runs=2,
    needs=("head_sequences", "sequences"),
    source="attention sink decay rate, arXiv 2507.23279; no code of its authors",
    section="phenomena",
    order=32,
)
def sink_decay(run: Run, other: Run, *, draws: Count = 500, seed: Natural = 0) -> Result:
    """How much of the attention that the first token draws is lost in a second run of the same texts?

    D = 1 − (1/H) Σ over heads of (Σ A′ ÷ Σ A), layer by layer: A is the attention that the first token gets from every query
    of every text in the first run, A′ in the second, usually under an intervention. 0 is no change, 1 is all of it lost, and
    less than 0 a sink that grew. The mean is over heads' ratios, so that a head which hardly attends to the first token counts
    as much as one that attends to nothing else, and may move it far: `decay of sums`, 1 − Σ A′ ÷ Σ A over all heads, does
    not have that. The first query of a text has nothing but the first token to see, so that D stays a little below 1.

    Args:
        draws: bootstrap resamples of documents.
        seed: of resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     options = {"probes": ["attention"], "progress": False}
        ...     runs = [ms.record(ms.load("demo"), ["Hello, you."], store, name=n, **options) for n in ("a", "b")]
        ...     set(ms.analyze(runs, "sink_decay").df().query("metric == 'decay'")["value"])
        {0.0}
    """
    before, after = (head_sums(r, [_METRIC]).get(_METRIC, []) for r in (run, other))
    pairs = _paired(run, other, before, after)
    frame = pd.concat([_decay(a, b, draws, seed) for a, b in pairs], ignore_index=True).reindex(columns=list(_COLUMNS))
    for name in ("layer", "head", "texts", "n"):
        frame[name] = frame[name].astype("Int64")
    layers = frame[frame["metric"] == "decay"]
    lost = int((layers["value"] >= 0.9).sum())
    strongest = layers.loc[layers["value"].idxmax()]
    shared = len(pairs[0][0].n)
    return Result(
        title=f"The first token {_changed(layers['value'].mean())} of its attention on average over {len(layers)} layers, 90 % or "
        f"more in {lost}; in layer {strongest['layer']}, where it loses most, it {_changed(strongest['value'])}",
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=draw_decay,
        n=int(pairs[0][0].n.sum()),
        n_unit="queries",
        definition="decay: 1 − mean over heads of (Σ A′ ÷ Σ A), A being the attention of every query to the first token of its text, "
        "in the first and (′) in the second run; decay of sums: 1 − Σ A′ ÷ Σ A over all heads; decay of head: 1 − Σ A′ ÷ Σ A of one. "
        "before, after: share of attention that the first token gets.",
        units={"value": "share lost", "before": "share of attention", "after": "share of attention"},
        interval=f"95 % percentile bootstrap over documents, {draws} resamples, both runs together",
        null="what D would be if all attention of the second run were uniform over earlier tokens; for an intervention's "
        "control, compare the first run with one under matched random edits",
        sql=HEADS_SQL,
        sql_parameters={"run": run.run_id, "condition": "base", "metrics": [_METRIC]},
        computation="the query's rows of both runs, texts of equal token ids paired; ratios by head",
        notes=(f"{shared:,} texts are in both runs with the same tokens.",),
    )


def _paired(run: Run, other: Run, before: list[HeadSums], after: list[HeadSums]) -> list[tuple[HeadSums, HeadSums]]:
    """The same texts at the same places in both runs."""
    second: Mapping[tuple[int, str], HeadSums] = {(h.layer, h.block): h for h in after}
    pairs = []
    for heads in before:
        match = second.get((heads.layer, heads.block))
        if match is None or match.sums.shape[1] != heads.sums.shape[1]:
            continue
        keys = [list(zip(h.sequence, h.content, strict=True)) for h in (heads, match)]
        both = set(keys[0]) & set(keys[1])
        if both:
            chosen = (np.array([key in both for key in own]) for own in keys)
            pairs.append(tuple(h.of(c) for h, c in zip((heads, match), chosen, strict=True)))
    if not pairs:
        raise InputError(
            f"runs {run.name!r} and {other.name!r} cannot be compared",
            expected="the same texts and layers, recorded with the probe attention in both",
            found="no text of equal tokens at any layer of equal heads",
            fix="record the same corpus with the same settings in both runs",
        )
    return pairs  # type: ignore[return-value]  # of two each


def _decay(before: HeadSums, after: HeadSums, draws: int, seed: int) -> pd.DataFrame:
    first, second = (h.by_document(h.sums) for h in (before, after))
    uniform = before.by_document(_uniform(before.n)[:, None])
    documents = len(first)
    weights = np.ones((1, documents))
    if documents > 1:
        weights = np.concatenate([weights, document_weights(documents, draws=draws, seed=seed).astype(np.float64)])
    a, b, u = weights @ first, weights @ second, weights @ uniform  # [draw, head]
    ratio = np.divide(b, a, out=np.full_like(a, np.nan), where=a > 0)
    of_all = b.sum(axis=1) / a.sum(axis=1)
    even = 1 - (u[0] / a[0])
    n, heads = before.n.sum(), a.shape[1]
    parts = [
        ("decay", 1 - ratio.mean(axis=1), float(even.mean()), a[0].mean() / n, b[0].mean() / n, None),
        ("decay of sums", 1 - of_all, float(1 - u[0, 0] * heads / a[0].sum()), a[0].mean() / n, b[0].mean() / n, None),
        *(("decay of head", 1 - ratio[:, h], float(even[h]), a[0, h] / n, b[0, h] / n, h) for h in range(heads)),
    ]
    return pd.DataFrame(
        [
            {
                "metric": metric, "layer": before.layer, "block": before.block, "head": head, "value": float(values[0]),
                **_bounds(values[1:]), "null": null, "before": float(was), "after": float(now), "texts": len(before.n), "n": int(n),
            }
            for metric, values, null, was, now, head in parts
        ]
    )  # fmt: skip


def _changed(decay: float) -> str:
    return f"loses {decay:.1%}" if decay >= 0 else f"gains {-decay:.1%}"


def _bounds(values: NDArray[np.float64]) -> dict[str, float]:
    if not len(values):
        return {"ci_low": float("nan"), "ci_high": float("nan")}
    low, high = np.quantile(values, [0.025, 0.975])
    return {"ci_low": float(low), "ci_high": float(high)}


def _uniform(lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """Attention to the first token of texts of these lengths, summed over queries, were it uniform: harmonic numbers."""
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, lengths.max() + 1))])
    found: NDArray[np.float64] = harmonic[lengths]
    return found
