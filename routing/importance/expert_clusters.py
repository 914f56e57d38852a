"""Behavioural clusters of experts: groups that are used alike, against profiles shuffled over documents."""

from __future__ import annotations

from dataclasses import dataclass
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
from moescope.core.statistics import permutation_p
from moescope.routing.grid import layer_name
from moescope.routing.importance.expert_sums import LOGITS, Array, listed, resampling_units
from moescope.routing.trace import Router, Trace, read_trace
from moescope.store.run import Run

_CLUSTER, _OWN, _MEAN = "cluster", "silhouette", "mean silhouette"
_MOST = 10
# Tokens whose logits make a profile, and values of a profile, at most.
_LENGTH = 2048


@dataclass(frozen=True)
class _Clustering:
    """Clusters of the experts that have a profile: [expert] number, silhouette and place in the tree."""

    number: NDArray[np.int64]
    silhouette: Array
    place: NDArray[np.int64]

    @property
    def score(self) -> float:
        return float(self.silhouette.mean())


@analysis(
    name="expert_clusters",
    needs=("routing",),
    source="average linkage as in arXiv 2410.08589 (HC-SMoE) and arXiv 2409.06211 (STUN); silhouette: Rousseeuw 1987",
    section="importance",
    order=60,
)
def expert_clusters(
    run: Run,
    *,
    basis: Literal["usage", "logits"] = "usage",
    clusters: Count | None = None,
    shuffles: Count = 10,
    seed: Natural = 0,
) -> Result:
    """Do the experts of a layer fall into groups that are used alike?

    Every expert has a profile: the share of each document's decisions that name it (usage), or its router logits over
    tokens. Distance is 1 − correlation of two profiles; experts are joined by average linkage and the tree is cut where the
    mean silhouette is largest, or into as many clusters as asked for. Silhouette (b − a) ÷ max(a, b), a the mean
    distance to one's own cluster and b to the next: near 1 for clear groups, near 0 for none. Published clusterings use
    outputs or weights of experts, which a store does not hold; this one needs decisions alone.

    Args:
        basis: what the profile is made of; `logits` needs the probe router_logits.
        clusters: how many; where not given, from 2 to 10 by the largest mean silhouette.
        shuffles: of every profile by itself, for the null, clustered and cut the same way.
        seed: of the shuffles.
    """
    trace = read_trace(run)
    if basis == "usage" and trace.n_documents < 3:
        raise InputError(
            f"run {run.name!r} has {trace.n_documents} documents, too few for profiles of use",
            expected="three documents or more",
            fix='record more documents, or cluster by logits (basis="logits")',
        )
    unit, units, notes = resampling_units(trace, seed=seed)
    generator = np.random.default_rng(seed)
    picked = np.sort(generator.permutation(trace.tokens)[:_LENGTH])
    frames = []
    for router in trace.routers:
        profiles = _usage(router, unit, units) if basis == "usage" else _logits(trace, router, picked)
        frames.append(_rows(router, profiles, clusters, shuffles, generator))
    frame = pd.concat(frames, ignore_index=True)
    if basis == "logits" and trace.tokens > _LENGTH:
        notes = (*notes, f"Logits of {_LENGTH:,} tokens drawn at random make the profiles.")
    if left := int((frame["metric"] == _CLUSTER).sum() - frame.loc[frame["metric"] == _CLUSTER, "value"].notna().sum()):
        notes = (*notes, f"{left:,} experts are in no cluster: never chosen, or a profile that does not vary.")
    return Result(
        title=_title(frame),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=trace.decisions,
        n_unit="decisions",
        definition="Distance of two experts: 1 − correlation of "
        + ("their shares of each document's decisions" if basis == "usage" else "their router logits over tokens")
        + "; average linkage, cut "
        + ("where the mean silhouette is largest." if clusters is None else f"into {clusters} clusters.")
        + " place: position among the leaves of the tree.",
        units={
            f"value[{_CLUSTER}]": "number, by place in the tree",
            f"value[{_OWN}]": "−1 to 1",
            f"value[{_MEAN}]": "−1 to 1",
            "n": "experts",
        },
        null=f"every expert's profile shuffled by itself, clustered and cut the same way: mean of {shuffles}; "
        f"the smallest possible p is {1 / (shuffles + 1):.3f}",
        computation="scipy.cluster.hierarchy.linkage, method average",
        notes=(*trace.notes, *notes),
    )


def _usage(router: Router, unit: NDArray[np.int64], units: int) -> Array:
    """[expert, document] share of each document's decisions."""
    cell = unit[:, None] * router.n_experts + router.experts
    count = np.bincount(cell.ravel(), minlength=units * router.n_experts).reshape(units, -1).astype(np.float64)
    total = count.sum(axis=1, keepdims=True)
    profiles: Array = (count[total[:, 0] > 0] / total[total[:, 0] > 0]).T
    return profiles


def _logits(trace: Trace, router: Router, picked: NDArray[np.int64]) -> Array:
    logits = listed(trace, router, LOGITS, router.n_experts)
    if logits is None:
        raise InputError(
            f"run {trace.run.name!r} has no router logits of {router.name}",
            fix='record with --probe router_logits, or cluster by use (basis="usage")',
        )
    chosen = logits[picked]
    return chosen[np.isfinite(chosen).all(axis=1)].T


def _rows(
    router: Router, profiles: Array, clusters: int | None, shuffles: int, generator: np.random.Generator
) -> pd.DataFrame:
    size = router.n_experts
    varied = np.ptp(profiles, axis=1) > 1e-12 if profiles.shape[1] else np.zeros(size, bool)
    found = _clustered(profiles[varied], clusters)
    null = p = score = np.nan
    if found is not None:
        score = found.score
        again = [_clustered(generator.permuted(profiles[varied], axis=1), clusters) for _ in range(shuffles)]
        chance = np.array([part.score for part in again if part is not None])
        null, p = float(chance.mean()), float(permutation_p(np.array(score), chance))

    def spread(values: NDArray[np.generic] | None) -> Array:
        full = np.full(size, np.nan)
        if values is not None:
            full[varied] = values
        return full

    experts = pd.DataFrame({"expert": pd.array(np.arange(size), dtype="Int64")})
    experts["place"] = pd.array(spread(found.place if found else None), dtype="Int64")
    number = experts.assign(metric=_CLUSTER, value=spread(found.number if found else None), null=np.nan, p=np.nan)
    own = experts.assign(metric=_OWN, value=spread(found.silhouette if found else None), null=null, p=np.nan)
    mean = pd.DataFrame(
        {"expert": pd.array([None], dtype="Int64"), "place": pd.array([None], dtype="Int64"), "metric": _MEAN,
         "value": score, "null": null, "p": p}
    )  # fmt: skip
    frame = pd.concat([number, own, mean], ignore_index=True)
    frame.insert(0, "layer", router.layer)
    frame.insert(1, "block", router.block)
    count = None if found is None else int(found.number.max()) + 1
    return frame.assign(clusters=pd.array([count] * len(frame), dtype="Int64"), n=int(varied.sum()))


def _clustered(profiles: Array, clusters: int | None) -> _Clustering | None:
    """Clusters of three experts or more; None for fewer, which no cut can tell apart."""
    from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
    from scipy.spatial.distance import squareform

    size = len(profiles)
    if size < 3:
        return None
    centred = profiles - profiles.mean(axis=1, keepdims=True)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    distance = np.clip(1.0 - centred @ centred.T, 0.0, 2.0)
    np.fill_diagonal(distance, 0.0)
    distance = (distance + distance.T) / 2
    tree = linkage(squareform(distance, checks=False), method="average")
    leaves = leaves_list(tree)
    place = np.empty(size, np.int64)
    place[leaves] = np.arange(size)
    counts = [min(clusters, size)] if clusters is not None else list(range(2, min(_MOST, size - 1) + 1))
    cuts = [fcluster(tree, count, criterion="maxclust") - 1 for count in counts]
    options = [_Clustering(_by_place(cut, leaves), silhouettes(distance, cut), place) for cut in cuts]
    return max(options, key=lambda option: option.score)


def _by_place(number: NDArray[np.integer], leaves: NDArray[np.integer]) -> NDArray[np.int64]:
    """Clusters numbered in the order in which the tree's leaves meet them."""
    _, first = np.unique(number[leaves], return_index=True)
    order = np.argsort(np.argsort(first))
    renumbered: NDArray[np.int64] = order[number].astype(np.int64)
    return renumbered


def silhouettes(distance: Array, number: NDArray[np.integer]) -> Array:
    """(b − a) ÷ max(a, b) of each item (Rousseeuw 1987); 0 for an item alone in its cluster, and with one cluster.

    Args:
        distance: [item, item] symmetric.
        number: [item] cluster, 0-based.

    Example:
        >>> far = np.array([[0.0, 1, 4, 4], [1, 0, 4, 4], [4, 4, 0, 1], [4, 4, 1, 0]])
        >>> silhouettes(far, np.array([0, 0, 1, 1])).tolist()
        [0.75, 0.75, 0.75, 0.75]
    """
    member = np.eye(int(number.max()) + 1)[number]
    if member.shape[1] < 2:
        return np.zeros(len(number))
    count = member.sum(axis=0)
    total = distance @ member
    own = count[number]
    inside = np.divide(total[np.arange(len(number)), number], own - 1, out=np.zeros(len(number)), where=own > 1)
    means = total / count
    means[np.arange(len(number)), number] = np.inf
    outside = means.min(axis=1)
    largest = np.maximum(inside, outside)
    score = np.divide(outside - inside, largest, out=np.zeros(len(number)), where=largest > 0)
    result: Array = np.where(own > 1, score, 0.0)
    return result


def _title(frame: pd.DataFrame) -> str:
    part = frame[(frame["metric"] == _MEAN) & frame["value"].notna()]
    if part.empty:
        return "No layer has three experts whose use can be clustered"
    best = part.loc[(part["value"] - part["null"]).idxmax()]
    above = int((part["value"] > part["null"]).sum())
    return (
        f"Experts group most clearly in {layer_name(best['layer'], best['block'])}: {best['clusters']} clusters, mean silhouette "
        f"{best['value']:.2f} (shuffled: {best['null']:.2f}); {above} of {len(part)} layers lie above shuffled profiles"
    )


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    part = frame[frame["metric"] == _MEAN]
    own = frame[(frame["metric"] == _OWN) & frame["value"].notna()]
    names = [layer_name(r.layer, r.block) for r in part.itertuples()]
    figure = go.Figure()
    figure.add_scatter(
        x=[layer_name(r.layer, r.block) for r in own.itertuples()],
        y=own["value"],
        mode="markers",
        name="experts",
        marker={"color": SERIES[5], "size": 4, "opacity": 0.5},
        customdata=own["expert"].astype(int),
        hovertemplate="%{x}·E%{customdata}: %{y:.2f}<extra></extra>",
    )
    figure.add_scatter(
        x=names,
        y=part["value"],
        mode="lines+markers",
        name="mean of the layer",
        line={"color": SERIES[0]},
        customdata=part["clusters"].astype(float),
        hovertemplate="%{x}: %{y:.3f}, %{customdata} clusters<extra></extra>",
    )
    figure.add_scatter(
        x=names, y=part["null"], mode="lines", name="shuffled profiles", line={"color": CHANCE, "dash": "dash"}
    )
    figure.update_xaxes(title="layer", type="category", categoryorder="array", categoryarray=names)
    figure.update_yaxes(title="silhouette (1: clear groups, 0: none)")
    figure.update_layout(height=420)
    return figure
