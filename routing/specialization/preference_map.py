"""The figure of a preference: which experts stand out for which group of tokens."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moescope.core.figures import heatmap, plain
from moescope.routing.grid import layer_name

_SHOWN = 32
_LIMIT = 16.0


def preference_map(frame: pd.DataFrame, *, group: str, ratio: str, null_name: str) -> go.Figure:
    """Groups by the experts with the strongest preference, coloured by log2 of a ratio, with q and the null on hover.

    Args:
        frame: columns layer, block, expert, value, null, q, `group` and `ratio`.
        group: column naming the rows of the figure, in the order of first appearance among sorted names or categories.
        ratio: column with the share over what it is compared with.
        null_name: what the chance level is called.
    """
    top = frame[frame[ratio] > 1].sort_values(["q", ratio], ascending=[True, False])
    places = list(dict.fromkeys(zip(top["layer"], top["block"], top["expert"], strict=True)))[:_SHOWN]
    places.sort()
    # Groups that have an order of their own, as positions, bring it along in `rank`.
    by = "rank" if "rank" in frame else group
    groups = list(dict.fromkeys(frame.sort_values(by, kind="stable")[group]))
    keyed = frame.set_index([group, "layer", "block", "expert"])[["value", ratio, "q", "null"]]
    wanted = pd.MultiIndex.from_tuples([(name, *place) for name in groups for place in places], names=keyed.index.names)
    fields = keyed.reindex(wanted).to_numpy(dtype=float).reshape(len(groups), len(places), 4)
    figure = heatmap(
        np.log2(np.clip(fields[:, :, 1], 1 / _LIMIT, _LIMIT)),
        x=[f"{layer_name(a, b)}·E{e}" for a, b, e in places],
        y=[plain(str(name)) for name in groups],
        diverging=True,
        customdata=fields,
        colorbar=f"log2 {plain(ratio.replace('_', ' '))}, cut at ±4",
        hover=f"%{{y}} → %{{x}}<br>%{{customdata[0]:.1%}} of its tokens, {ratio.replace('_', ' ')} %{{customdata[1]:.2f}}<br>"
        f"{null_name}: %{{customdata[3]:.1%}}, q = %{{customdata[2]:.3f}}",
    )
    figure.update_xaxes(title=f"the {len(places)} experts with the strongest preference")
    figure.update_yaxes(title=group, dtick=1 if len(groups) <= 40 else None)
    figure.update_layout(height=max(380, min(1000, 220 + 22 * len(groups))))
    return figure
