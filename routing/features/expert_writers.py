"""One latent's card, or one expert's: which experts write the latent and are gated by it; what the expert writes."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import Count, analysis
from moescope.core.errors import InputError
from moescope.core.figures import CHANCE, SERIES
from moescope.core.result import Result
from moescope.routing.features.expert_pairs import (
    DEFINITIONS,
    INTERVAL,
    MAIN,
    NAMES,
    NULL,
    PAIRS_SQL,
    Pairs,
    expert_label,
    layer_of,
    read_pairs,
    with_bounds,
)
from moescope.store.run import Run

_COLUMNS = ("side", "rank", "feature", "layer", "block", "expert", "metric", "value", "ci_low", "ci_high", "null", "n")


_CHOSEN = "This latent is the one of largest number among those measured: interval and null do not know that."
_SAME_TOKENS = (
    "Writers were ranked on the tokens on which they were cut; intervals of the cut do not resample the controls."
)


@analysis(
    name="feature_writers",
    needs=("feature_experts",),
    source="decoder rows held against experts' outputs and router rows; ablation of the writers beside matched experts",
    section="features",
    order=61,
)
def feature_writers(
    run: Run,
    *,
    sae: str | None = None,
    feature: int | None = None,
    expert: int | None = None,
    layer: int | None = None,
    top: Count = 8,
) -> Result:
    """Which experts write one feature, and what does one expert write?

    Without an expert: the experts that write a latent most, in excess of the tokens on which it is inactive, and those whose
    router logit is higher where it is active; with what taking the first writers out leaves of it, where that was measured.
    With an expert (and its layer): the latents it writes most, and those that raise its logit most.

    Args:
        sae: name or id of the autoencoder; the newest that was measured by default.
        feature: the latent; by default one whose writers were taken out, or the one that is written most.
        expert: an expert instead.
        layer: of the expert, or of the writers; the first that was measured by default.
        top: how many on each side.

    Example:
        >>> import moescope as ms
        >>> def card(store: ms.Store) -> Result:
        ...     return ms.analyze(store.run("base"), "feature_writers", expert=3, layer=2)
    """
    if feature is not None and expert is not None:
        raise InputError("a card is of a feature or of an expert, not both", fix="leave one of them out")
    pairs = read_pairs(run, sae)
    if expert is None:
        chosen = _the_feature(pairs, feature)
        part = pairs.frame[pairs.frame["feature"] == chosen]
        what, subject = "expert", f"latent {chosen}"
    else:
        at = layer_of(pairs.frame[pairs.frame["expert"] == expert], layer, f"expert {expert}")
        part = pairs.frame[(pairs.frame["expert"] == expert) & (pairs.frame["layer"] == at)]
        what, subject = "feature", f"{expert_label(expert)} of layer {at}"
    kept = [_side(part, side, what, top, layer if expert is None else None) for side in MAIN]
    cut = part[part["metric"].str.startswith("ablat")] if expert is None else part.iloc[:0]
    frame = pd.concat([*kept, cut.assign(side="ablation", rank=pd.NA)], ignore_index=True)
    if frame.empty:
        raise InputError(
            f"nothing was kept of {subject}", fix="measure it with features=[…] (moescope sae experts --features)"
        )
    units = {f"value[{NAMES[m]}]": u for m, u in frame.groupby("metric")["unit"].first().items()}
    frame["rank"] = frame["rank"].astype("Int64")
    return Result(
        title=_title(frame, subject, what),
        table=pa.Table.from_pandas(frame.assign(metric=frame["metric"].map(NAMES))[list(_COLUMNS)], preserve_index=False),
        draw=_draw,
        definition=" ".join(DEFINITIONS.values()) + " Ablation: the share by which the latent's mean activation falls, on the tokens "
        "on which it was active, when the experts named are taken out together.",
        units={**units, "rank": "place", "n": "active tokens"},
        n=int(frame["n"].max()),
        n_unit="active tokens",
        interval=INTERVAL,
        null=NULL,
        sql=PAIRS_SQL,
        sql_parameters=pairs.parameters(run),
        computation=f"the {top} largest on each side",
        notes=(
            f"Autoencoder {pairs.sae.name} at {pairs.sae.site}.",
            *((_CHOSEN,) if expert is None and feature is None else ()),
            *((_SAME_TOKENS,) if len(cut) else ()),
        ),
    )  # fmt: skip


def _the_feature(pairs: Pairs, feature: int | None) -> int:
    there = pairs.frame["feature"]
    if feature is not None:
        if not (there == feature).any():
            raise InputError(
                f"nothing was measured of latent {feature}",
                found=f"{there.nunique():,} latents of {pairs.sae.name!r} were, those that are active often enough",
                fix="measure it on more text, or with fewer active tokens (moescope sae experts --least-active)",
            )
        return feature
    for metric in ("ablation_drop_excess", *MAIN.values()):
        part = pairs.of(metric)
        if len(part):
            return int(part.loc[part["value"].idxmax(), "feature"])
    return int(there.iloc[0])


def _side(part: pd.DataFrame, side: str, what: str, top: int, layer: int | None) -> pd.DataFrame:
    """The largest of one side, with every metric of each."""
    held = part[part["metric"] == MAIN[side]]
    if layer is not None and side == "writes":
        held = held[held["layer"] == layer]
    if held.empty:
        return part.iloc[:0].assign(side=side, rank=pd.NA)
    best = held.nlargest(top, "value")[["layer", "block", what]].assign(rank=range(1, min(top, len(held)) + 1))
    mine = part[part["metric"].str.startswith(side)].merge(best, on=["layer", "block", what])
    return mine.assign(side=side).sort_values(["metric", "rank"], kind="stable")


def _title(frame: pd.DataFrame, subject: str, what: str) -> str:
    first = frame[(frame["metric"] == MAIN["writes"]) & (frame["rank"] == 1)]
    text = subject[0].upper() + subject[1:]
    if len(first):
        row = first.iloc[0]
        other = (
            f"{expert_label(int(row['expert']))} of layer {int(row['layer'])}"
            if what == "expert"
            else f"latent {int(row['feature'])}"
        )
        null = "" if pd.isna(row["null"]) else f" (null {row['null']:.2g})"
        text += f" {'is written most by' if what == 'expert' else 'writes most'} {other}: {with_bounds(row)} in excess{null}"
    else:
        moved = frame[(frame["metric"] == MAIN["gates"]) & (frame["rank"] == 1)]
        row = moved.iloc[0] if len(moved) else frame.iloc[0]
        text += f": {NAMES[str(row['metric'])]} {with_bounds(row)}"
    cut = frame[frame["metric"] == "ablation_drop"]
    if len(cut):
        row = cut.iloc[0]
        bounds = "" if pd.isna(row["ci_low"]) else f" [{_percent(row['ci_low'])}, {_percent(row['ci_high'])}]"
        text += (
            f"; without its writers it loses {_percent(row['value'])}{bounds} % of its activation, "
            f"without matched experts {_percent(row['null'])} %"
        )
    return text


def _percent(share: float) -> str:
    """A share in percent, one decimal where it is small."""
    text = f"{100 * share:.0f}" if abs(share) >= 0.1 else f"{100 * share:.1f}"
    return text.replace("-0.0", "0.0").replace("-", "−")


def _draw(result: Result) -> go.Figure:
    from plotly.subplots import make_subplots

    frame = result.df()
    sides = [
        (side, NAMES[metric], unit)
        for side, metric, unit in (
            ("writes", MAIN["writes"], "excess along the decoder row"),
            ("gates", MAIN["gates"], "logits, active less inactive"),
        )
        if ((frame["side"] == side) & (frame["metric"] == NAMES[metric])).any()
    ]
    of_expert = result.parameters.get("expert") is not None
    figure = make_subplots(rows=1, cols=max(1, len(sides)), horizontal_spacing=0.2)
    for number, (side, metric, unit) in enumerate(sides):
        part = frame[(frame["side"] == side) & (frame["metric"] == metric)].sort_values("rank", ascending=False)
        names = [
            f"latent {int(r.feature)}" if of_expert else f"L{int(r.layer)}·{expert_label(int(r.expert))}"
            for r in part.itertuples()
        ]
        figure.add_trace(
            go.Scatter(
                x=part["value"], y=names, mode="markers", marker={"color": SERIES[number], "size": 9}, name=metric,
                error_x={
                    "type": "data", "symmetric": False, "array": (part["ci_high"] - part["value"]).fillna(0),
                    "arrayminus": (part["value"] - part["ci_low"]).fillna(0), "thickness": 1.5,
                },
                hovertemplate="%{y}: %{x:.3g}<extra></extra>",
            ),
            row=1, col=number + 1,
        )  # fmt: skip
        figure.add_trace(
            go.Scatter(
                x=part["null"], y=names, mode="markers", marker={"color": CHANCE, "symbol": "line-ns-open", "size": 12},
                name="null", showlegend=number == 0, hovertemplate="null of %{y}: %{x:.3g}<extra></extra>",
            ),
            row=1, col=number + 1,
        )  # fmt: skip
        figure.add_vline(x=0, line={"color": CHANCE, "dash": "dash"}, row=1, col=number + 1)
        figure.update_xaxes(title=unit, row=1, col=number + 1)
    figure.update_layout(height=max(300, 170 + 26 * int(result.parameters.get("top", 8))))
    return figure
