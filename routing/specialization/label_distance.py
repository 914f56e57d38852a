"""Distance between labels by the experts they use, with the tree that it gives."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.routing.specialization.dendrogram import clades, dendrogram, merged
from moescope.routing.specialization.divergence import distribution, entropy_bits
from moescope.routing.specialization.label_counts import LabelCounts, read_label_counts
from moescope.routing.specialization.resampling import CENTRED, centred_interval
from moescope.store.run import Run

Floats = NDArray[np.float64]
Linkage = Literal["average", "complete", "single"]

DISTANCE, SUPPORT = "JS distance", "bootstrap support of the group"


@analysis(
    name="label_distance",
    needs=("routing", "sequences"),
    source="Deep Language Geometry (distances and tree of languages), here by expert use; Endres & Schindelin 2003 "
    "(Jensen–Shannon distance); Felsenstein 1985 (bootstrap support)",
    section="specialization",
    order=15,
)
def label_distance(
    run: Run,
    *,
    layer: Natural | None = None,
    linkage: Linkage = "average",
    permutations: Count = 200,
    draws: Count = 200,
    seed: Natural = 0,
) -> Result:
    """Which labels use the same experts, and which use others?

    A label's profile is its distribution of decisions over experts, router by router. The distance of two labels is the
    square root of the Jensen–Shannon divergence of their profiles in bits, averaged over routers: 0 for the same use of
    experts, 1 where they share none. Hierarchical clustering of these distances gives the tree; the support of a group is
    the share of bootstrap resamples of documents in whose tree it comes out whole.

    Trap: two labels differ by chance too, the more so the fewer documents they have; the chance level shuffles labels over
    documents, keeping how many documents each label has.

    Args:
        layer: only this layer; all by default.
        linkage: how a group's distance is taken from its members': mean, largest, or smallest.
        permutations: shuffles of labels over documents.
        draws: bootstrap resamples of documents, within labels.
        seed: of both.

    Raises:
        InputError: fewer than two labels, or no router in that layer.

    Example:
        >>> import tempfile, pathlib
        >>> import pyarrow as pa
        >>> import moescope as ms
        >>> trace = pa.table({"sequence_id": [0, 0, 1, 1], "position": [0, 1, 0, 1], "layer": [0] * 4,
        ...                   "experts": [[0], [0], [1], [1]], "label": ["a", "a", "b", "b"]})
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = store.import_trace(trace, name="tiny", n_experts=2)
        ...     ms.analyze(run, "label_distance").df()["value"][0].item()  # no expert is shared
        1.0
    """
    read = read_label_counts(run)
    counts = [c for router, c in zip(read.routers, read.counts, strict=True) if layer in (None, router.layer)]
    if not counts:
        layers = dict.fromkeys(str(router.layer) for router in read.routers)
        raise InputError(f"run {run.name!r} has no router in layer {layer}", expected=f"a layer of {', '.join(layers)}")
    observed = _distances([read.member @ c for c in counts])
    shuffled = _distances([read.shuffled_sums(c, permutations, seed) for c in counts])
    spread = _distances([read.resampled_sums(c, draws, seed) for c in counts]) if read.resampling_moves else None
    frame = pd.concat(
        [_pairs(read, observed, shuffled, spread), _groups(read, observed, spread, linkage)], ignore_index=True
    )
    return Result(
        title=_title(frame),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=int(read.tokens.sum()),
        n_unit="labelled tokens",
        definition="Square root of the Jensen–Shannon divergence (bits) of two labels' distributions over experts, averaged "
        f"over {'all routers' if layer is None else f'the routers of layer {layer}'}; tree by {linkage} linkage. Branches: "
        "share of resamples in whose tree the group is whole.",
        units={f"value[{DISTANCE}]": "√bits", f"value[{SUPPORT}]": "share of resamples", "p": "probability"},
        interval=CENTRED.format(within=" within labels", draws=draws),
        null=f"mean distance of the pair when labels are shuffled over documents, {permutations} times; "
        f"the smallest possible p is {1 / (permutations + 1):.3f}",
        computation="decisions counted for each document and expert; scipy hierarchical clustering",
        notes=read.trace.notes,
    )


def _distances(sums: list[Floats]) -> Floats:
    """[..., pair] distance of each pair of labels, from each router's [..., label, expert] decisions."""
    labels = sums[0].shape[-2]
    first, second = np.triu_indices(labels, 1)
    total = np.zeros((*sums[0].shape[:-2], len(first)))
    for of_router in sums:
        profile = distribution(of_router)
        entropy = entropy_bits(profile)
        for pair, (a, b) in enumerate(zip(first, second, strict=True)):
            mixed = entropy_bits((profile[..., a, :] + profile[..., b, :]) / 2)
            total[..., pair] += mixed - (entropy[..., a] + entropy[..., b]) / 2
    return np.sqrt(np.maximum(total / len(sums), 0.0))


def _pairs(read: LabelCounts, observed: Floats, shuffled: Floats, spread: Floats | None) -> pd.DataFrame:
    """One row a pair of labels, the nearest first."""
    first, second = np.triu_indices(len(read.names), 1)
    none = np.full(observed.shape, np.nan)
    low, high = (none, none) if spread is None else centred_interval(observed, spread)
    tokens = read.member @ read.tokens
    frame = pd.DataFrame(
        {
            "label": [read.names[a] for a in first],
            "other": [read.names[b] for b in second],
            "metric": DISTANCE,
            "value": observed,
            "ci_low": np.clip(low, 0, 1),
            "ci_high": np.clip(high, 0, 1),
            "null": shuffled.mean(0),
            "p": (1 + (shuffled >= observed * (1 - 1e-12)).sum(0)) / (1 + len(shuffled)),
            "n": (tokens[first] + tokens[second]).astype(np.int64),
        }
    )
    return frame.sort_values("value", kind="stable")


def _groups(read: LabelCounts, observed: Floats, spread: Floats | None, linkage: Linkage) -> pd.DataFrame:
    """One row a group of the tree: its members (numbers of labels in alphabetical order), its height, its support."""
    tree = merged(observed, linkage)
    found = clades(tree)
    tokens = read.member @ read.tokens
    support = [np.nan] * len(found)
    if spread is not None:
        trees = [set(clades(merged(distances, linkage))) for distances in spread]
        support = [float(np.mean([group in other for other in trees])) for group in found]
    return pd.DataFrame(
        {
            "metric": SUPPORT,
            "value": support,
            "members": [" ".join(map(str, sorted(group))) for group in found],
            "height": tree[:, 2],
            "n": [int(tokens[sorted(group)].sum()) for group in found],
        }
    )


def _title(frame: pd.DataFrame) -> str:
    pairs = frame[frame["metric"] == DISTANCE]
    near, far = pairs.iloc[0], pairs.iloc[-1]
    apart = int((pairs["p"] < 0.05).sum())
    if len(pairs) == 1:
        return (
            f"{near['label']} and {near['other']} are {near['value']:.2f} apart in the experts they use, "
            f"{near['null']:.2f} with shuffled labels"
        )
    return (
        f"{near['label']} and {near['other']} use the most similar experts (distance {near['value']:.2f}), {far['label']} and "
        f"{far['other']} the least ({far['value']:.2f}); {apart} of {len(pairs)} pairs are farther apart than shuffled labels "
        f"(about {pairs['null'].mean():.2f})"
    )


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    pairs, groups = frame[frame["metric"] == DISTANCE], frame[frame["metric"] == SUPPORT]
    names = sorted({*pairs["label"], *pairs["other"]})
    number = {name: place for place, name in enumerate(names)}
    distances = np.zeros((len(names), len(names)))
    for row in pairs.itertuples():
        distances[number[row.label], number[row.other]] = row.value
    support: dict[frozenset[int], Any] = {
        frozenset(map(int, members.split())): value
        for members, value in zip(groups["members"], groups["value"], strict=True)
    }
    linkage = str(result.parameters.get("linkage", "average"))
    upper = distances[np.triu_indices(len(names), 1)]
    return dendrogram(upper, names, linkage=linkage, support=support, chance=float(pairs["null"].mean()))
