"""Trees of hierarchical clustering: their groups, and their drawing in Plotly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from moescope.core.figures import CHANCE, SERIES, plain

Floats = NDArray[np.float64]


def merged(distances: Floats, linkage: str) -> Floats:
    """[merge, 4] scipy's linkage of items with these pairwise distances (upper triangle, row by row)."""
    from scipy.cluster.hierarchy import linkage as link

    tree: Floats = link(distances, method=linkage)
    return tree


def clades(tree: Floats) -> list[frozenset[int]]:
    """The items below each merge, in the order of merges; the last has all.

    Example:
        >>> [sorted(group) for group in clades(np.array([[0, 2, 0.1, 2], [1, 3, 0.4, 3]]))]
        [[0, 2], [0, 1, 2]]
    """
    below: list[frozenset[int]] = [frozenset([item]) for item in range(len(tree) + 1)]
    for first, second in tree[:, :2].astype(int):
        below.append(below[first] | below[second])
    return below[len(tree) + 1 :]


def dendrogram(
    distances: Floats,
    names: Sequence[str],
    *,
    linkage: str,
    support: Mapping[frozenset[int], float],
    chance: float,
) -> go.Figure:
    """The tree lying on its side: items at the left, merges at their distance, their support written beside them.

    Args:
        distances: upper triangle, row by row, in the order of `names`.
        names: of items.
        linkage: as in scipy.
        support: group → share of resamples; a group that has none, or NaN, gets no number.
        chance: distance to mark as the chance level.
    """
    tree = merged(distances, linkage)
    groups = clades(tree)
    order = _leaves(tree)
    height = {item: float(place) for place, item in enumerate(order)}
    reach = dict.fromkeys(range(len(names)), 0.0)
    x: list[float | None] = []
    y: list[float | None] = []
    marks: list[tuple[float, float, str]] = []
    for number, (first, second, distance, _) in enumerate(tree):
        a, b, joint = int(first), int(second), len(names) + number
        x += [reach[a], distance, distance, reach[b], None]
        y += [height[a], height[a], height[b], height[b], None]
        height[joint], reach[joint] = (height[a] + height[b]) / 2, float(distance)
        share = support.get(groups[number], np.nan)
        if np.isfinite(share) and number < len(tree) - 1:
            marks.append((float(distance), height[joint], f"{share:.0%}"))
    figure = go.Figure(
        go.Scatter(x=x, y=y, mode="lines", line={"color": SERIES[0], "width": 2}, name="tree", hoverinfo="skip")
    )
    figure.add_scatter(
        x=[mark[0] for mark in marks],
        y=[mark[1] for mark in marks],
        mode="markers+text",
        text=[mark[2] for mark in marks],
        textposition="top right",
        marker={"color": SERIES[1], "size": 7},
        name="support: share of resamples with this group",
        hovertemplate="distance %{x:.3f}, support %{text}<extra></extra>",
    )
    figure.add_scatter(
        x=[chance, chance],
        y=[-0.5, len(names) - 0.5],
        mode="lines",
        line={"color": CHANCE, "dash": "dash"},
        name="labels shuffled over documents",
        hovertemplate=f"shuffled labels: {chance:.3f}<extra></extra>",
    )
    written = [plain(names[item]) for item in order]
    figure.update_yaxes(tickmode="array", tickvals=list(range(len(names))), ticktext=written, showgrid=False)
    figure.update_xaxes(title="distance (√bits of Jensen–Shannon divergence)", rangemode="tozero")
    figure.update_layout(height=max(300, min(900, 200 + 26 * len(names))), yaxis={"automargin": True})
    return figure


def _leaves(tree: Floats) -> list[int]:
    """Items in an order in which no branches cross."""
    from scipy.cluster.hierarchy import leaves_list

    return [int(item) for item in leaves_list(tree)]
