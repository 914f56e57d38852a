"""Communities of experts: groups that are chosen together, found in the graph of pairs above chance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.figures import CHANCE, SERIES
from moescope.core.result import Result
from moescope.routing.grid import layer_name
from moescope.routing.specialization.expert_pairs import PairCounts, chosen_routers, count_router
from moescope.routing.trace import read_trace
from moescope.store.run import Run

Floats = NDArray[np.float64]

MODULARITY, COMMUNITY = "modularity", "community of the expert"


@analysis(
    name="expert_communities",
    needs=("routing",),
    source="Blondel et al. 2008 (Louvain), Newman 2004 (modularity); co-activation of arXiv 2409.02060 §5",
    section="specialization",
    order=60,
)
def expert_communities(
    run: Run, *, layer: Natural | None = None, min_expected: Count = 5, shuffles: Count = 6, seed: Natural = 0
) -> Result:
    """Do experts of a layer form groups that are chosen together?

    The experts of a router are the nodes of a graph; two are joined where their pair is chosen more often than load alone
    gives, with weight observed ÷ chance − 1 (see `coactivation`). Louvain's method cuts it into communities; the modularity
    is the weight inside of communities less what the nodes' strengths alone would put there. Communities are numbered from
    0, the largest first.

    Trap: Louvain finds communities in any graph, also in noise. The chance level is the modularity it reaches when the same
    weights are laid on random pairs; only what exceeds it is structure.

    Args:
        layer: only this layer; all by default.
        min_expected: pairs that chance would bring together in fewer tokens than this are left out, their ratio is noise.
        shuffles: of the weights over pairs, for the chance level.
        seed: of Louvain's order and of the shuffles.

    Raises:
        InputError: there is no router in that layer.

    Example:
        >>> import tempfile, pathlib
        >>> import pyarrow as pa
        >>> import moescope as ms
        >>> experts = [[0, 1], [2, 3]] * 20
        >>> trace = pa.table({"sequence_id": [0] * 40, "position": list(range(40)), "layer": [0] * 40, "experts": experts})
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = store.import_trace(trace, name="tiny", n_experts=4)
        ...     frame = ms.analyze(run, "expert_communities").df()
        >>> frame["value"].tolist()  # modularity, then the community of each expert
        [0.5, 0.0, 0.0, 1.0, 1.0]
    """
    trace = read_trace(run)
    frames = [
        _of_router(count_router(router, "all"), min_expected, shuffles, seed) for router in chosen_routers(trace, layer)
    ]
    frame = pd.concat(frames, ignore_index=True).sort_values("metric", key=lambda m: m != MODULARITY, kind="stable")
    return Result(
        title=_title(frame),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=trace.tokens,
        n_unit="tokens",
        definition="Louvain communities of the graph in which two experts are joined with weight observed ÷ chance − 1 where "
        "they are chosen together more often than chance; modularity of that partition.",
        units={
            f"value[{MODULARITY}]": "modularity",
            f"value[{COMMUNITY}]": "number of the community",
            "null": "modularity",
            "null_high": "modularity",
        },
        null=f"modularity that Louvain reaches on the same weights laid on random pairs, mean of {shuffles} shuffles; "
        "null_high is the largest of them",
        computation="pairs counted token by token; networkx louvain_communities",
        notes=trace.notes,
    )


def _of_router(found: PairCounts, min_expected: int, shuffles: int, seed: int) -> pd.DataFrame:
    """The modularity of one router, and the community of each expert that is used."""
    upper = np.triu_indices(found.router.n_experts, 1)
    known = found.chance[upper] >= min_expected
    weights = np.where(known, np.maximum(found.over_chance[upper] - 1, 0.0), 0.0)
    used = np.flatnonzero(found.tokens > 0)
    groups, modularity = _louvain(used, upper, weights, seed)
    generator = np.random.default_rng(seed)
    null = [_louvain(used, upper, _laid_anew(weights, known, generator), seed)[1] for _ in range(shuffles)]
    of_expert = {expert: number for number, members in enumerate(groups) for expert in members}
    whole = {"expert": pd.NA, "metric": MODULARITY, "value": modularity, "null": float(np.mean(null))}
    whole |= {"null_high": float(np.max(null))}
    rows = [whole | {"communities": sum(len(members) > 1 for members in groups), "n": len(found.router.experts)}]
    rows += [
        {"expert": e, "metric": COMMUNITY, "value": float(of_expert[e]), "null": np.nan, "n": int(found.tokens[e])}
        | {"communities": pd.NA, "null_high": np.nan}
        for e in used.tolist()
    ]
    frame = pd.DataFrame(rows).astype({"expert": "Int64", "communities": "Int64"})
    frame.insert(0, "layer", found.router.layer)
    frame.insert(1, "block", found.router.block)
    return frame


def _laid_anew(weights: Floats, known: NDArray[np.bool_], generator: np.random.Generator) -> Floats:
    """The weights of known pairs in another order."""
    laid = weights.copy()
    laid[known] = generator.permutation(weights[known])
    return laid


def _louvain(
    used: NDArray[np.int64], upper: tuple[NDArray[Any], ...], weights: Floats, seed: int
) -> tuple[list[list[int]], float]:
    """Communities, the largest first and of equals the one with the lowest expert; and their modularity, 0 without edges."""
    import networkx as nx

    graph = nx.Graph()
    graph.add_nodes_from(used.tolist())
    joined = np.flatnonzero(weights > 1e-9)
    first, second = upper[0][joined].tolist(), upper[1][joined].tolist()
    graph.add_weighted_edges_from(zip(first, second, weights[joined].tolist(), strict=True))
    if not len(joined):
        return [[expert] for expert in used.tolist()], 0.0
    found = nx.community.louvain_communities(graph, seed=seed)
    ordered = sorted((sorted(members) for members in found), key=lambda members: (-len(members), members[0]))
    return ordered, float(nx.community.modularity(graph, found))


def _title(frame: pd.DataFrame) -> str:
    layers = frame[frame["metric"] == MODULARITY]
    best = layers.loc[(layers["value"] - layers["null"]).idxmax()]
    over = int((layers["value"] > layers["null_high"]).sum())
    if best["value"] <= best["null_high"]:
        return "No layer's experts form groups beyond what the same pairs laid at random give"
    return (
        f"Experts group most in {layer_name(best['layer'], best['block'])}: {best['communities']} communities with "
        f"modularity {best['value']:.2f}, against {best['null']:.2f} for the same weights on random pairs; "
        f"{over} of {len(layers)} routers exceed all their shuffles"
    )


def _draw(result: Result) -> go.Figure:
    """Modularity by layer, with its chance level."""
    frame = result.df()
    layers = frame[frame["metric"] == MODULARITY].sort_values(["layer", "block"])
    x = [layer_name(r.layer, r.block) for r in layers.itertuples()]
    figure = go.Figure(
        go.Scatter(
            x=x,
            y=layers["value"],
            mode="lines+markers",
            name="modularity",
            line={"color": SERIES[0]},
            customdata=layers["communities"].to_numpy(dtype=float),
            hovertemplate="%{x}: %{y:.3f}, %{customdata:.0f} communities<extra></extra>",
        )
    )
    figure.add_scatter(
        x=x, y=layers["null"], mode="lines", name="same weights on random pairs", line={"color": CHANCE, "dash": "dash"}
    )
    figure.update_xaxes(title="layer", type="category", nticks=32)
    figure.update_yaxes(title="modularity", rangemode="tozero")
    figure.update_layout(height=380)
    return figure
