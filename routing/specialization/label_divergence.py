"""How far labels differ in the experts they use, layer by layer, and how selective each expert is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.result import Result
from moescope.routing.grid import layer_name
from moescope.routing.specialization.divergence import distribution, divergence_bits
from moescope.routing.specialization.label_counts import LabelCounts, read_label_counts
from moescope.routing.specialization.layer_lines import layer_lines
from moescope.routing.specialization.resampling import CENTRED, centred_interval
from moescope.routing.trace import Router
from moescope.store.run import Run

Floats = NDArray[np.floating[Any]]

BETWEEN = "JS divergence between labels"
EXPERT = "JS divergence of the expert's labels"
VARIATION = "coefficient of variation over labels"
# Experts chosen more rarely than this have no ratio worth a coefficient of variation (ljcleo/moe-lrc).
_RAREST = 1e-5


@analysis(
    name="label_divergence",
    needs=("routing", "sequences"),
    source="arXiv 2412.14711 (JS divergence between domains), arXiv 2206.02770, arXiv 2505.16056 (domain specialisation)",
    section="specialization",
    order=10,
)
def label_divergence(run: Run, *, permutations: Count = 200, draws: Count = 500, seed: Natural = 0) -> Result:
    """How far do labels differ in the experts they use, and which experts care?

    For each router: the Jensen–Shannon divergence of the labels' distributions over experts, H(mean) − mean H in bits, every
    label weighing the same; 0 where all labels use the experts alike, log2(labels) where no two share an expert.
    For each expert: the divergence in bits between its distribution over labels (share of each label's tokens, scaled to sum
    to 1) and the even one, at most 1; and the coefficient of variation (standard deviation with ddof = 1 over mean) of that
    share over labels, at most √labels. Experts chosen by at most 1e-5 of the labelled tokens have neither.

    Trap: all three are above 0 for any finite sample, so each is to be read against its shuffles.

    Args:
        permutations: shuffles of labels over documents.
        draws: bootstrap resamples of documents, within labels.
        seed: of both.

    Example:
        >>> import tempfile, pathlib
        >>> import pyarrow as pa
        >>> import moescope as ms
        >>> trace = pa.table({"sequence_id": [0, 0, 1, 1], "position": [0, 1, 0, 1], "layer": [0] * 4,
        ...                   "experts": [[0], [0], [1], [1]], "label": ["a", "a", "b", "b"]})
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = store.import_trace(trace, name="tiny", n_experts=2)
        ...     ms.analyze(run, "label_divergence").df()["value"][0].item()  # no expert is shared: log2(2) bits
        1.0
    """
    read = read_label_counts(run)
    frames = [
        _of_router(read, router, counts, permutations, draws, seed)
        for router, counts in zip(read.routers, read.counts, strict=True)
    ]
    frame = pd.concat(frames, ignore_index=True).sort_values("metric", key=lambda m: m != BETWEEN, kind="stable")
    return Result(
        title=_title(frame, len(read.names)),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=int(read.tokens.sum()),
        n_unit="labelled tokens",
        definition="For each layer the Jensen–Shannon divergence of the labels' distributions over experts, labels weighing "
        "the same; for each expert the divergence of its distribution over labels from the even one, and the coefficient of "
        f"variation (ddof = 1) of its share over labels. Labels: {len(read.names)}.",
        units={f"value[{BETWEEN}]": "bits", f"value[{EXPERT}]": "bits", f"value[{VARIATION}]": "ratio"},
        interval=CENTRED.format(within=" within labels", draws=draws),
        null=f"mean of {permutations} shuffles of the labels over documents",
        computation="decisions counted for each document and expert, then shuffles and resamples of documents",
        notes=(*read.trace.notes, *_dropped(frame, read)),
    )


def _of_router(
    read: LabelCounts, router: Router, counts: Floats, permutations: int, draws: int, seed: int
) -> pd.DataFrame:
    """All rows of one router."""
    both = np.column_stack([counts, read.tokens])
    observed = _measures(read.member @ both)
    null = [values.mean(0) for values in _measures(read.shuffled_sums(both, permutations, seed))]
    if read.resampling_moves:
        spread = _measures(read.resampled_sums(both, draws, seed))
        bounds = [centred_interval(value, resampled) for value, resampled in zip(observed, spread, strict=True)]
    else:
        bounds = [(np.full_like(value, np.nan), np.full_like(value, np.nan)) for value in observed]
    used = np.flatnonzero(counts.sum(0) > _RAREST * read.tokens.sum())
    taken = (np.zeros(1, np.int64), used, used)
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "layer": router.layer,
                    "block": router.block,
                    "expert": pd.array([pd.NA] if metric == BETWEEN else rows, dtype="Int64"),
                    "metric": metric,
                    "value": value[rows],
                    "ci_low": low[rows],
                    "ci_high": high[rows],
                    "null": chance[rows],
                    "n": [counts.sum()] if metric == BETWEEN else counts.sum(0)[rows],
                }
            ).astype({"n": np.int64})
            for metric, value, (low, high), chance, rows in zip(
                (BETWEEN, EXPERT, VARIATION), observed, bounds, null, taken, strict=True
            )
        ]
    )


def _measures(sums: Floats) -> tuple[Floats, Floats, Floats]:
    """Divergence between labels [..., 1], and per expert divergence and variation [..., expert].

    Args:
        sums: [..., label, expert + 1] tokens of each label that chose the expert; in the last column all its tokens.
    """
    counts, tokens = sums[..., :-1], sums[..., -1]
    between = divergence_bits(distribution(counts))[..., None]
    share = counts / tokens[..., None]
    of_expert = np.swapaxes(distribution(np.swapaxes(share, -1, -2)), -1, -2)
    even = np.full_like(of_expert, 1 / share.shape[-2])
    apart = divergence_bits(np.stack([np.swapaxes(of_expert, -1, -2), np.swapaxes(even, -1, -2)], axis=-2))
    mean = share.mean(-2)
    variation = np.divide(share.std(-2, ddof=1), mean, out=np.zeros_like(mean), where=mean > 0)
    return between, apart, variation


def _dropped(frame: pd.DataFrame, read: LabelCounts) -> tuple[str, ...]:
    dropped = sum(router.n_experts for router in read.routers) - int((frame["metric"] == VARIATION).sum())
    return (f"{dropped:,} experts chosen by at most 0.001 % of the tokens are left out.",) if dropped else ()


def _title(frame: pd.DataFrame, labels: int) -> str:
    layers = frame[frame["metric"] == BETWEEN]
    best = layers.loc[(layers["value"] - layers["null"]).idxmax()]
    if best["value"] <= best["null"] or best["ci_low"] <= best["null"]:
        return (
            f"Labels differ in their experts no more than shuffled labels do: {best['value']:.3f} against "
            f"{best['null']:.3f} bits in {layer_name(best['layer'], best['block'])}, where they differ most"
        )
    return (
        f"Labels differ most in {layer_name(best['layer'], best['block'])}: {best['value']:.3f} of at most "
        f"{np.log2(labels):.2f} bits between their experts, {best['null']:.3f} when labels are shuffled"
    )


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    return layer_lines(
        frame[frame["metric"] == BETWEEN],
        series="metric",
        title_y="divergence between labels (bits)",
        null_name="labels shuffled over documents",
    )
