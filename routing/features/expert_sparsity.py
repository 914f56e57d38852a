"""Does a router take the experts in which a token turns on the fewest neurons?"""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import analysis
from moescope.core.errors import InputError
from moescope.core.figures import CHANCE, SERIES
from moescope.core.result import Result
from moescope.routing.features.expert_pairs import INTERVAL, with_bounds
from moescope.store.run import Run

_SQL = """
    SELECT s.site, m.metric, m.condition, m.group_kind, m.group_value, m.value, m.ci_low, m.ci_high, m.n, m.unit
    FROM sae_measures m
    JOIN saes s ON s.sae_id = m.sae_id
    WHERE m.run_id = $run AND s.architecture = 'expert_neurons'
      AND m.metric IN ('routing_spearman', 'routing_recall', 'l0_spearman', 'l0_chosen', 'l0_not_chosen', 'l0', 'swap_delta_nll')
    ORDER BY m.metric, m.condition, s.site, m.group_kind, TRY_CAST(m.group_value AS INTEGER)
"""
_NAMES = {
    "routing_spearman": "rank correlation with the router",
    "routing_recall": "recall of the router's choice",
    "l0_spearman": "expected against counted",
    "l0_chosen": "neurons on, chosen experts",
    "l0_not_chosen": "neurons on, other experts",
    "l0": "neurons on, by expert",
    "swap_delta_nll": "ΔNLL with the router swapped",
}
_CHANCE = ("routing_spearman", "routing_recall", "swap_delta_nll")
_COLUMNS = ("layer", "block", "expert", "score", "metric", "value", "ci_low", "ci_high", "null", "n")


@analysis(
    name="expert_sparsity_routing",
    needs=("sae_measures",),
    source="MoE-X, sparsity-aware routing: arXiv 2503.07639",
    section="features",
    order=62,
)
def expert_sparsity_routing(run: Run, *, layer: int | None = None) -> Result:
    """Does the router send tokens to the experts in which they turn on the fewest neurons?

    With W the rows of an expert's gate, μ = x · mean over neurons of W and σ² = Σ x_i² · Var over neurons of W_i, a token x is
    expected to turn on d_expert · ½ (1 + erf(μ ÷ (σ √2))) of its neurons; the score ranks experts by the fewest. It is held
    against the router's logits (mean over tokens of the rank correlation over experts) and its choice (share of the chosen experts
    among the k lowest), beside the neurons counted, and put in the router's place in one layer at a time.

    Trap: a neuron counts as on where its gate is over 0 before the activation function. In the paper's ReLU experts the
    others are 0; in gated experts (SwiGLU) they are small, and this L0 is no count of zeros. The paper trains its router by the
    score; a model that was trained otherwise has no reason to follow it.

    Args:
        layer: one layer; all that were measured by default.

    Example:
        >>> import moescope as ms
        >>> def agreement(store: ms.Store) -> Result:
        ...     return ms.analyze(store.run("base"), "expert_sparsity_routing")
    """
    frame = run.sql(_SQL).df()
    parts = frame["site"].str.extract(r"^blocks\.(?P<layer>\d+)\.(?P<block>.+)\.hook_in$")
    frame = frame.assign(layer=parts["layer"].astype(int), block=parts["block"])
    if layer is not None:
        frame = frame[frame["layer"] == layer]
    if frame.empty:
        where = "" if layer is None else f" of layer {layer}"
        raise InputError(
            f"the sparsity of experts{where} was not measured on run {run.name!r}",
            fix="measure it: moescope sae experts --sparsity, or moescope.sae.expert_sparsity",
        )
    table = _table(frame)
    units = frame.groupby("metric")["unit"].first()
    return Result(
        title=_title(table),
        table=pa.Table.from_pandas(table[list(_COLUMNS)], preserve_index=False),
        draw=_draw,
        definition="expected_l0: neurons expected on, from the mean and variance of an expert's rows; counted_l0: gates over 0. "
        "Rank correlation with the router: Spearman over the experts of a token, of its logits with fewer neurons, mean over tokens. "
        "Recall: share of the chosen experts among the k of fewest. ΔNLL: nats a token, with one layer's router swapped for the k "
        "experts of fewest expected neurons.",
        units={**{f"value[{_NAMES[m]}]": str(u) for m, u in units.items()}, "n": "tokens"},
        n=int(table["n"].max()),
        n_unit="tokens",
        interval=INTERVAL,
        null="rank correlation 0, recall k ÷ experts, ΔNLL with k random experts",
        sql=_SQL,
        sql_parameters={"run": run.run_id},
        computation="the random router's number beside each",
        notes=("Experts as the router's weights saw them: null and shared experts have no neurons to count.",),
    )


def _table(frame: pd.DataFrame) -> pd.DataFrame:
    random = frame[frame["condition"] == "random"].set_index(["layer", "block", "metric"])["value"]
    held = frame[frame["condition"] != "random"].copy()
    held["null"] = [
        random.get((r.layer, r.block, r.metric)) if r.metric in _CHANCE else None for r in held.itertuples()
    ]
    held["null"] = held["null"].astype(float)
    is_expert = held["group_kind"] == "expert"
    held["expert"] = pd.to_numeric(held["group_value"].where(is_expert), errors="coerce").astype("Int64")
    held["score"] = held["condition"]
    held["metric"] = held["metric"].map(_NAMES)
    return held.sort_values(["metric", "score", "layer", "block", "expert"], kind="stable").reset_index(drop=True)


def _title(table: pd.DataFrame) -> str:
    score = table[table["score"] == "expected_l0"]
    agree = score[score["metric"] == _NAMES["routing_spearman"]]
    recall = score[score["metric"] == _NAMES["routing_recall"]].set_index("layer")
    most = agree.loc[agree["value"].abs().idxmax()]
    text = (
        f"Fewest expected neurons and the router's logits have a rank correlation of {with_bounds(most, 2)} in layer "
        f"{int(most['layer'])}"
    )
    if len(agree) > 1:
        text += f" (over {len(agree)} layers {agree['value'].min():.2f} to {agree['value'].max():.2f})"
    mine = recall.loc[int(most["layer"])]
    mine = mine.iloc[0] if isinstance(mine, pd.DataFrame) else mine
    text += f"; it finds {100 * mine['value']:.0f} % of the chosen experts, chance {100 * mine['null']:.0f} %"
    swap = score[score["metric"] == _NAMES["swap_delta_nll"]]
    swap = swap[swap["layer"] == most["layer"]]
    if len(swap):
        row = swap.iloc[0]
        text += f", and in the router's place costs {row['value']:.2g} nats (random experts {row['null']:.2g})"
    return text


def _draw(result: Result) -> go.Figure:
    from plotly.subplots import make_subplots

    frame = result.df()
    panels = [
        (name, unit)
        for name, unit in (
            (_NAMES["routing_spearman"], "rank correlation with the router"),
            (_NAMES["routing_recall"], "share of the chosen experts found"),
            (_NAMES["swap_delta_nll"], "ΔNLL, one router swapped (nats)"),
        )
        if (frame["metric"] == name).any()
    ]
    figure = make_subplots(rows=1, cols=max(1, len(panels)), horizontal_spacing=0.11)
    shown: set[str] = set()
    for number, (metric, unit) in enumerate(panels):
        part = frame[frame["metric"] == metric]
        for _color, (score, points) in enumerate(part.groupby("score", sort=False)):
            called = {"expected_l0": "expected from weights", "counted_l0": "counted"}.get(str(score), str(score))
            figure.add_trace(
                go.Scatter(
                    x=points["layer"], y=points["value"], mode="lines+markers", name=called, legendgroup=called,
                    line={"color": SERIES[0 if score == "expected_l0" else 1]}, showlegend=called not in shown,
                    error_y={
                        "type": "data", "symmetric": False, "array": (points["ci_high"] - points["value"]).fillna(0),
                        "arrayminus": (points["value"] - points["ci_low"]).fillna(0), "thickness": 1,
                    },
                    hovertemplate=f"L%{{x}}, {called}: %{{y:.3g}}<extra></extra>",
                ),
                row=1, col=number + 1,
            )  # fmt: skip
            shown.add(called)
        chance = part.drop_duplicates("layer")
        figure.add_trace(
            go.Scatter(
                x=chance["layer"], y=chance["null"], mode="lines+markers", name="random experts", legendgroup="random",
                line={"color": CHANCE, "dash": "dash"}, marker={"symbol": "line-ew-open"}, showlegend=number == 0,
                hovertemplate="L%{x}, random experts: %{y:.3g}<extra></extra>",
            ),
            row=1, col=number + 1,
        )  # fmt: skip
        figure.update_xaxes(title="layer", dtick=max(1, part["layer"].nunique() // 12), row=1, col=number + 1)
        figure.update_yaxes(title=unit, row=1, col=number + 1)
        numbers = pd.concat([part["value"], part["null"]]).dropna()
        if metric == _NAMES["swap_delta_nll"] and len(numbers) and 0 < numbers.min() < numbers.max() / 10:
            figure.update_yaxes(
                type="log", dtick="D1" if numbers.max() < 30 * numbers.min() else 1, row=1, col=number + 1
            )
    figure.update_layout(height=400)
    return figure
