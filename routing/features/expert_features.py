"""Latents × experts: which experts write which latents, and whose routers the latents move."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import Count, analysis
from moescope.core.figures import heatmap
from moescope.core.result import Result
from moescope.routing.features.expert_pairs import (
    DEFINITIONS,
    INTERVAL,
    MAIN,
    NAMES,
    NULL,
    PAIRS_SQL,
    agreement,
    expert_label,
    layer_of,
    read_pairs,
    with_bounds,
)
from moescope.store.run import Run

_P = 0.05
_COLUMNS = ("feature", "layer", "block", "expert", "metric", "value", "ci_low", "ci_high", "null", "n")


@analysis(
    name="expert_features",
    needs=("feature_experts",),
    source="decoder rows held against experts' outputs and router rows; MoE as a wide sparse MLP: arXiv 2503.07639",
    section="features",
    order=60,
)
def expert_features(
    run: Run,
    *,
    sae: str | None = None,
    side: Literal["writes", "gates"] = "writes",
    layer: int | None = None,
    features: Count = 24,
    order: Literal["null", "size"] = "null",
) -> Result:
    """Which experts write which features, and which experts do features gate?

    Writing is the expert's part of the block's output along the latent's unit decoder row, averaged over the tokens on which the
    latent is active, less the same average over the others: an expert that always writes that direction has none. Gating is the
    expert's router logit, centred over experts, on active tokens less that on the others. Shown are the latents whose largest
    number over the experts is most times its null (`size`: is largest), next to those with the same expert.

    Trap: a decoder row read against router rows by weights alone leaves out everything between, the norm's scale too; here it
    stands beside what was measured, with the correlation of the two over all pairs.

    Args:
        sae: name or id of the autoencoder; the newest that was measured by default.
        side: `writes`, or `gates`.
        layer: of the router; the first that was measured by default.
        features: latents shown.
        order: which are shown: those furthest over their null, or those of largest `size`.

    Example:
        >>> import moescope as ms
        >>> def shown(store: ms.Store) -> Result:
        ...     return ms.analyze(store.run("base"), "expert_features", side="gates")
    """
    pairs = read_pairs(run, sae)
    main = MAIN[side]
    held = pairs.of(main)
    at = layer_of(held, layer, "who writes latents" if side == "writes" else "the routers that latents reach")
    held = held[(held["layer"] == at) & (held["block"] == held.loc[held["layer"] == at, "block"].iloc[0])]
    chosen = _strongest(held, features, order)
    shown = pairs.frame[pairs.frame["feature"].isin(chosen) & (pairs.frame["layer"] == at)]
    shown = shown[shown["metric"].str.startswith(f"{side}_") | (shown["metric"] == side)]
    shown = shown.assign(order=shown["feature"].map({f: n for n, f in enumerate(chosen)}))
    shown = shown.sort_values(["metric", "order", "expert"], kind="stable")
    table = shown[list(_COLUMNS)].assign(metric=shown["metric"].map(NAMES))
    return Result(
        title=_title(shown, main, chosen, at, side),
        table=pa.Table.from_pandas(table, preserve_index=False),
        draw=_draw,
        definition=DEFINITIONS[side],
        units=_units(shown),
        n=int(shown.loc[shown["metric"] == main, "n"].groupby(shown["feature"]).first().sum()),
        n_unit="active tokens",
        interval=INTERVAL,
        null=NULL,
        sql=PAIRS_SQL,
        sql_parameters=pairs.parameters(run),
        computation=f"the {len(chosen)} latents that stand out most over the experts of layer {at}",
        notes=(
            f"Autoencoder {pairs.sae.name} at {pairs.sae.site}.",
            "Latents are the strongest of many: their numbers are the largest of as many draws, and the null and p of each pair "
            "do not know that.",
            *(agreement(run, pairs.sae) if side == "gates" else ()),
        ),
    )


def _strongest(held: pd.DataFrame, features: int, order: str) -> list[int]:
    """Latents whose largest number stands out most, those of one expert next to each other."""
    # Of other latents only some experts are kept: those of whom all are, where there are any.
    kept = held.groupby("feature")["expert"].transform("count")
    whole = held[kept == kept.max()]
    best = whole.loc[whole.groupby("feature")["value"].idxmax()].set_index("feature")
    by_null = order == "null" and bool((best["null"] > 0).all())
    score = best["value"] / best["null"] if by_null else best["value"]
    best = best.assign(score=-score).loc[score.nlargest(features).index]
    return [int(f) for f in best.sort_values(["expert", "score"], kind="stable").index]


def _title(shown: pd.DataFrame, main: str, chosen: list[int], layer: int, side: str) -> str:
    held = shown[shown["metric"] == main]
    top = held.loc[held["value"].idxmax()]
    verb = "writes" if side == "writes" else "is moved by"
    text = f"{expert_label(int(top['expert']))} of layer {layer} {verb} latent {int(top['feature'])} most: {with_bounds(top)}"
    text += " in excess of its inactive tokens" if side == "writes" else " logits"
    if not pd.isna(top["null"]):
        text += f" (null {top['null']:.2g})"
    p = shown[shown["metric"] == f"{main}_p"].set_index(["feature", "expert"])["value"]
    best = held.loc[held.groupby("feature")["value"].idxmax()]
    known = [p.get((f, e)) for f, e in zip(best["feature"], best["expert"], strict=True)]
    known = [float(value) for value in known if value is not None]
    if known:
        below = sum(value < _P for value in known)
        text += f"; the first expert of {below} of {len(known)} latents shown stands out at p < {_P:g}"
    return text


def _units(shown: pd.DataFrame) -> dict[str, str]:
    units = {f"value[{NAMES[m]}]": u for m, u in shown.groupby("metric")["unit"].first().items()}
    return {**units, "n": "active tokens"}


def _draw(result: Result) -> go.Figure:
    side = str(result.parameters.get("side", "writes"))
    frame = result.df()
    held = frame[frame["metric"] == NAMES[MAIN[side]]]
    features = [int(f) for f in dict.fromkeys(held["feature"])]
    experts = sorted((int(e) for e in held["expert"].unique()), key=lambda e: (e < 0, abs(e)))
    row, column = {f: n for n, f in enumerate(features)}, {e: n for n, e in enumerate(experts)}
    values = np.full((len(features), len(experts)), np.nan)
    hover = np.full((*values.shape, 4), "—", dtype=object)
    for one in held.itertuples():
        place = row[int(one.feature)], column[int(one.expert)]
        values[place] = one.value
        bounds = "—" if pd.isna(one.ci_low) else f"{one.ci_low:.3g} to {one.ci_high:.3g}"
        hover[place] = [f"{one.value:.3g}", bounds, "—" if pd.isna(one.null) else f"{one.null:.3g}", f"{one.n:,}"]
    largest = np.nanmax(np.abs(values), axis=1, keepdims=True)
    names = [f"F{f} ({size:.3g})" for f, size in zip(features, largest[:, 0], strict=True)]
    unit = "excess along the decoder row" if side == "writes" else "logits, active less inactive"
    figure = heatmap(
        values / np.where(largest > 0, largest, 1.0),
        x=[expert_label(e) for e in experts],
        y=names,
        hover="%{y} × %{x}: %{customdata[0]}<br>interval %{customdata[1]}<br>null %{customdata[2]}<br>%{customdata[3]} active tokens",
        colorbar=f"share of the latent's largest ({unit})",
        diverging=True,
        customdata=hover,
    )
    figure.update_traces(zmin=-1, zmax=1)
    figure.update_xaxes(title=f"expert of layer {int(held['layer'].iloc[0])}")
    figure.update_yaxes(title="latent (its largest)", nticks=len(features))
    figure.update_layout(height=max(320, 190 + 18 * len(features)))
    return figure
