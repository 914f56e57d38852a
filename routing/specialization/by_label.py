"""Specialization by label: which experts prefer which kind of text, against shuffled labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.result import Result
from moescope.core.statistics import benjamini_hochberg, bootstrap_ratio
from moescope.routing.grid import layer_name
from moescope.routing.specialization.label_counts import LabelCounts, read_label_counts
from moescope.routing.specialization.preference_map import preference_map
from moescope.store.run import Run


@analysis(
    name="specialization",
    needs=("routing", "sequences"),
    source="arXiv 2409.02060 §5.2: tokens of a domain that select the expert",
    section="experts",
    order=20,
)
def specialization(run: Run, *, permutations: Count = 200, draws: Count = 1000, seed: Natural = 0) -> Result:
    """Which experts prefer which label, beyond what shuffled labels give?

    For every expert and label: the share of the label's tokens that choose the expert (`value`), and `lift`, that share over
    the expert's share of all labelled tokens. The null shuffles labels over documents; p counts shuffles whose lift is at
    least as large, and q controls the false-discovery rate over all pairs. How far the labels differ as a whole says
    `label_divergence`.

    Trap: the released code divides by the label's decisions times k, which is the same number only where every token has k
    decisions; the share here is of tokens.

    Args:
        permutations: shuffles of labels over documents.
        draws: bootstrap resamples of documents.
        seed: of both.

    Example:
        >>> import tempfile, pathlib
        >>> import pyarrow as pa
        >>> import moescope as ms
        >>> trace = pa.table({"sequence_id": [0, 0, 1, 1], "position": [0, 1, 0, 1], "layer": [0] * 4,
        ...                   "experts": [[0], [0], [0], [1]], "label": ["a", "a", "b", "b"]})
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = store.import_trace(trace, name="tiny", n_experts=2)
        ...     frame = ms.analyze(run, "specialization").df()
        >>> frame.set_index(["label", "expert"])["value"]["b", 1].item()
        0.5
    """
    read = read_label_counts(run)
    counts = np.concatenate(read.counts, axis=1)
    lift, share = _lift(read.member, counts, read.tokens)
    p, shuffled_share = _against_shuffles(read, counts, lift, permutations, seed)
    low, high = _interval(read, counts, draws, seed)
    frame = _table(read, share, low, high, shuffled_share, lift, p)
    return Result(
        title=_title(frame),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=int(read.tokens.sum()),
        n_unit="labelled tokens",
        definition="Share of a label's tokens that choose the expert; lift is that share "
        "over the expert's share of all labelled tokens.",
        units={
            "value": "share of tokens",
            "lift": "ratio",
            "null": "share of tokens",
            "p": "probability",
            "q": "false-discovery rate",
        },
        interval=f"95 % percentile bootstrap over the label's documents, {draws} resamples",
        null=f"mean share when labels are shuffled over documents, {permutations} times; "
        f"the smallest possible p is {1 / (permutations + 1):.3f}",
        computation="decisions counted for each document and expert, then shuffles and resamples of documents",
        notes=read.trace.notes,
    )


def _lift(member: NDArray[Any], counts: NDArray[Any], tokens: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Lift and share, both [label, expert]; lift is 1 where nobody chose the expert."""
    share = (member @ counts) / (member @ tokens)[:, None]
    overall = counts.sum(0) / tokens.sum()
    return np.divide(share, overall, out=np.ones_like(share), where=overall > 0), share


def _against_shuffles(
    read: LabelCounts, counts: NDArray[Any], lift: NDArray[Any], permutations: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[label, expert] p, as `permutation_p` counts it but without keeping every shuffle, and the mean share of shuffles."""
    at_least, share_sum = np.ones(lift.shape), np.zeros(lift.shape)
    for member in read.shuffled_members(permutations, seed):
        shuffled, share = _lift(member, counts, read.tokens)
        # Equal lifts come out a rounding apart where a shuffle gives a label the same documents in another order.
        at_least += shuffled >= lift * (1 - 1e-12)
        share_sum += share
    return at_least / (1 + permutations), share_sum / permutations


def _interval(
    read: LabelCounts, counts: NDArray[Any], draws: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[label, expert] bounds of the share."""
    low, high = np.empty((len(read.names), counts.shape[1])), np.empty((len(read.names), counts.shape[1]))
    for number in range(len(read.names)):
        mine = read.label == number
        _, low[number], high[number] = bootstrap_ratio(counts[mine], read.tokens[mine, None], draws=draws, seed=seed)
    return low, high


def _table(read: LabelCounts, *columns: NDArray[Any]) -> pd.DataFrame:
    """One row a label and expert, the surest preferences first."""
    share, low, high, null, lift, p = columns
    sizes = [router.n_experts for router in read.routers]
    labels = len(read.names)
    frame = pd.DataFrame(
        {
            "layer": np.tile(np.repeat([r.layer for r in read.routers], sizes), labels),
            "block": np.tile(np.repeat([r.block for r in read.routers], sizes), labels),
            "expert": np.tile(np.concatenate([np.arange(size) for size in sizes]), labels),
            "label": np.repeat(np.array(read.names, dtype=object), sum(sizes)),
            "metric": "share of the label's tokens",
            "value": share.ravel(),
            "ci_low": low.ravel(),
            "ci_high": high.ravel(),
            "null": null.ravel(),
            "lift": lift.ravel(),
            "p": p.ravel(),
            "q": benjamini_hochberg(p).ravel(),
            "n": np.repeat((read.member @ read.tokens).astype(np.int64), sum(sizes)),
        }
    )
    return frame.sort_values(["q", "lift"], ascending=[True, False], kind="stable")


def _title(frame: pd.DataFrame) -> str:
    found = frame[(frame["q"] < 0.05) & (frame["lift"] > 1)]
    if found.empty:
        return "No expert prefers a label beyond what shuffled labels give (q < 0.05)"
    # A rare expert reaches a high lift with a handful of tokens: name one that takes at least the mean share.
    common = found[found["value"] >= frame["value"].mean()]
    best = (found if common.empty else common).sort_values("lift", ascending=False).iloc[0]
    return (
        f"{len(found):,} of {len(frame):,} expert–label pairs are specialized (q < 0.05); "
        f"strongest: {layer_name(best['layer'], best['block'])}·"
        f"E{best['expert']} takes {best['value']:.0%} of {best['label']} "
        f"tokens, {best['lift']:.1f}× its overall share"
    )


def _draw(result: Result) -> go.Figure:
    return preference_map(result.df(), group="label", ratio="lift", null_name="shuffled labels")
