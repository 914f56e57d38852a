"""Are a MoE layer's own neurons as easy to read as an autoencoder's latents?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.figures import CHANCE, SERIES, plain
from moescope.core.result import Result
from moescope.routing.features.feature_tables import chosen_sae
from moescope.store.run import Run

_SETS_SQL = """
    SELECT s.sae_id::VARCHAR AS sae_id, s.name, s.architecture, s.d_sae, max(f.tokens) AS tokens,
        sum(f.active) / max(f.tokens) AS l0, count(*) FILTER (f.active > 0) AS alive, TRY_CAST(s.settings->>'least' AS DOUBLE) AS least
    FROM saes s
    JOIN features f ON f.sae_id = s.sae_id AND f.run_id = $run
    WHERE s.sae_id = $sae OR s.architecture IN ('expert_neurons', 'rotated_expert_neurons')
    GROUP BY ALL
"""
_SCORES_SQL = """
    SELECT s.name, m.metric, m.condition, TRY_CAST(m.group_value AS INTEGER) AS feature, m.value
    FROM sae_measures m
    JOIN saes s ON s.sae_id = m.sae_id
    WHERE m.run_id = $run AND m.group_kind = 'feature' AND m.metric IN ('predicted_by_token', 'predicted_by_label')
      AND (s.sae_id = $sae OR s.architecture IN ('expert_neurons', 'rotated_expert_neurons'))
    ORDER BY s.name, m.metric, m.condition, feature
"""
_LIFTS_SQL = """
    SELECT s.name, l.feature, max(l.lift) AS lift, min(l.q) AS q
    FROM feature_labels l
    JOIN saes s ON s.sae_id = l.sae_id
    JOIN features f ON f.sae_id = l.sae_id AND f.run_id = l.run_id AND f.feature = l.feature
    WHERE l.run_id = $run AND f.active >= $least
      AND (s.sae_id = $sae OR s.architecture IN ('expert_neurons', 'rotated_expert_neurons'))
    GROUP BY ALL
    ORDER BY s.name, l.feature
"""
_KINDS = {"expert_neurons": "neurons", "rotated_expert_neurons": "rotated neurons"}
_NAMES = {
    "predicted_by_token": "predicted by the token",
    "predicted_by_label": "predicted by the label",
    "lift": "largest lift of a label",
    "called": "goes with a label",
    "l0": "active on a token",
    "alive": "active at all",
}
_UNITS = {
    "predicted_by_token": "correlation", "predicted_by_label": "correlation", "lift": "ratio", "called": "share of units",
    "l0": "units", "alive": "units",
}  # fmt: skip
_Q = 0.05


@analysis(
    name="neurons_against_sae",
    needs=("features", "sae_measures"),
    source="MoE as one wide sparse MLP: MoE-X, arXiv 2503.07639; prediction of activations: arXiv 2408.00657",
    section="features",
    order=63,
)
def neurons_against_sae(
    run: Run, *, sae: str | None = None, least_active: Count = 20, draws: Count = 1000, seed: Natural = 0
) -> Result:
    """Are a MoE layer's neurons as easy to read as an autoencoder's latents?

    A MoE layer is one wide sparse MLP: every neuron of every expert is a unit, in either sign. Units are compared on the
    same tokens, with as many active on a token: how well a unit's activation is predicted by the token, or by the document's
    label, alone (correlation on documents that the rule was not learned from), how far its strongest label lifts it, and which share
    goes with a label at a false-discovery rate of 5 %. The same neurons along random axes of each expert write the same sum: what
    they reach needs no neuron to mean anything.

    Trap: in gated experts nearly every neuron of a chosen expert is a little active; which ones count is set so that L0
    is the autoencoder's. Without that, rarer units win by being rare.

    Args:
        sae: name or id of the autoencoder; the newest by default that is no layer's neurons.
        least_active: units active on fewer tokens are left out of the lifts.
        draws: bootstrap resamples of units.
        seed: of the resampling.

    Example:
        >>> import moescope as ms
        >>> def compared(store: ms.Store) -> Result:
        ...     return ms.analyze(store.run("base"), "neurons_against_sae")
    """
    sets = _sets(run, sae)
    values = _values(run, sets, least_active)
    rows: list[dict[str, Any]] = []
    for kind, name in zip(sets["kind"], sets["name"], strict=True):
        mine = values[values["name"] == name]
        for metric, part in mine.groupby("metric", sort=False):
            value, low, high = _mean(part["value"].to_numpy(), draws, seed)
            null = part["null"].mean() if part["null"].notna().any() else np.nan
            rows.append(_row(kind, name, str(metric), value, low, high, null, len(part)))
        facts = sets[sets["name"] == name].iloc[0]
        rows.append(_row(kind, name, "l0", float(facts["l0"]), np.nan, np.nan, np.nan, int(facts["tokens"])))
        rows.append(_row(kind, name, "alive", float(facts["alive"]), np.nan, np.nan, np.nan, int(facts["d_sae"])))
    table = pd.DataFrame(rows)
    return Result(
        title=_title(table),
        table=pa.Table.from_pandas(table, preserve_index=False),
        draw=_draw,
        definition="Means over units. predicted by the token (label): Pearson correlation, on the other half of the documents, of a unit's "
        "activation with its mean over tokens of the same id (label). Largest lift: P(active | label) ÷ P(active), largest over labels. "
        f"Goes with a label: smallest q under {_Q:g}.",
        units={f"value[{_NAMES[m]}]": u for m, u in _UNITS.items() if _NAMES[m] in set(table["metric"])}
        | {"n": "units, tokens for L0"},
        n=int(sets["tokens"].max()),
        n_unit="tokens",
        interval="95 % percentile bootstrap over units",
        null="the unit's activations moved along the corpus, or labels given out anew (predictions); compare lifts with rotated neurons",
        sql=_SCORES_SQL,
        sql_parameters={"run": run.run_id, "sae": str(sets["sae_id"].iloc[0])},
        computation="means over units, with lifts from feature_labels",
        notes=tuple(_notes(sets)),
    )


def _sets(run: Run, sae: str | None) -> pd.DataFrame:
    """The autoencoder first, then the newest neurons and rotated neurons."""
    chosen = chosen_sae(run, sae)
    frame = run.sql(_SETS_SQL, {"sae": chosen.sae_id}).df()
    frame["kind"] = frame["architecture"].map(_KINDS).fillna("latents")
    own = frame[frame["sae_id"] == chosen.sae_id]
    if chosen.architecture in _KINDS:
        raise InputError(
            f"{chosen.name!r} are a layer's neurons", expected="an autoencoder to set beside them", fix="name one (sae)"
        )
    # Of several settings, those whose L0 is nearest the autoencoder's.
    far = (np.log(frame["l0"]) - np.log(float(own["l0"].iloc[0]))).abs()
    others = frame.assign(far=far)[frame["kind"] != "latents"].sort_values("far").drop_duplicates("kind")
    if "neurons" not in set(others["kind"]):
        raise InputError(
            f"no layer's neurons were read on run {run.name!r}",
            fix="read them: moescope sae experts --neurons, or moescope.sae.compare_neurons",
        )
    return pd.concat([own, others.sort_values("kind")], ignore_index=True)


def _values(run: Run, sets: pd.DataFrame, least: int) -> pd.DataFrame:
    """name, metric, value, null of each unit."""
    given = {"sae": str(sets["sae_id"].iloc[0])}
    scores = run.sql(_SCORES_SQL, given).df()
    scores = scores.pivot_table(index=["name", "metric", "feature"], columns="condition", values="value").reset_index()
    scores = scores.rename(columns={"sae": "value", "shuffled": "null"})
    lifts = run.sql(_LIFTS_SQL, {**given, "least": least}).df()
    parts = [
        scores.reindex(columns=["name", "metric", "value", "null"]),
        lifts.assign(metric="lift", value=lifts["lift"], null=np.nan)[["name", "metric", "value", "null"]],
        lifts.assign(metric="called", value=(lifts["q"] < _Q).astype(float), null=np.nan)[
            ["name", "metric", "value", "null"]
        ],
    ]
    found = pd.concat([part for part in parts if len(part)], ignore_index=True)
    return found[found["value"].notna() & found["name"].isin(sets["name"])]


def _mean(values: NDArray[np.float64], draws: int, seed: int) -> tuple[float, float, float]:
    if len(values) < 2:
        return float(values.mean()), np.nan, np.nan
    random = np.random.default_rng(seed)
    drawn = np.array([values[random.integers(0, len(values), len(values))].mean() for _ in range(draws)])
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def _row(
    kind: str, name: str, metric: str, value: float, low: float, high: float, null: float, n: int
) -> dict[str, Any]:
    return {
        "units": kind, "name": name, "metric": _NAMES[metric], "value": value, "ci_low": low, "ci_high": high, "null": null, "n": n,
    }  # fmt: skip


def _notes(sets: pd.DataFrame) -> list[str]:
    told = [f"{r.kind}: {r.name}, {int(r.d_sae):,} of them, {r.l0:.3g} active on a token." for r in sets.itertuples()]
    if sets["l0"].max() > 1.5 * sets["l0"].min():
        told.append("L0 differs by more than half: lifts are not to be compared.")
    if sets["d_sae"].max() > 1.5 * sets["d_sae"].min():
        told.append("The sets are not equally wide: at equal L0 units of the wider one are rarer, which raises lifts.")
    if sets["tokens"].nunique() > 1:
        told.append("They were not read on the same tokens: read them again, with compare_neurons.")
    return told


def _title(table: pd.DataFrame) -> str:
    there = set(table["metric"])
    main = next(_NAMES[m] for m in ("predicted_by_token", "lift", "l0") if _NAMES[m] in there)
    by = table[table["metric"] == main].set_index("units")
    what = {
        _NAMES["predicted_by_token"]: "a unit's activation is predicted by the token with a mean correlation of",
        _NAMES["lift"]: "the mean largest lift of a label is",
    }.get(main, "units active on a token are")

    def told(kind: str) -> str:
        row = by.loc[kind]
        return f"{row['value']:.3g}" + (
            "" if pd.isna(row["ci_low"]) else f" [{row['ci_low']:.3g}, {row['ci_high']:.3g}]"
        )

    known = [kind for kind in ("latents", "neurons", "rotated neurons") if kind in by.index]
    parts = [f"{told(kind)} for {kind}" for kind in known]
    null = by["null"].dropna()
    chance = "" if null.empty else f" (null {null.abs().max():.2g} at most)"
    return f"At equal L0 {what} {', '.join(parts)}{chance}"


def _draw(result: Result) -> go.Figure:
    from plotly.subplots import make_subplots

    frame = result.df()
    order = [_NAMES["predicted_by_token"], _NAMES["predicted_by_label"], _NAMES["lift"], _NAMES["called"]]
    shown = [name for name in order if (frame["metric"] == name).any()]
    units = {_NAMES[metric]: unit for metric, unit in _UNITS.items()}
    figure = make_subplots(
        rows=1,
        cols=max(1, len(shown)),
        horizontal_spacing=0.08,
        subplot_titles=[f"{plain(n)}<br>({plain(units[n])})" for n in shown],
    )
    for number, metric in enumerate(shown):
        part = frame[frame["metric"] == metric]
        figure.add_trace(
            go.Bar(
                x=part["units"].str.replace(" ", "<br>"), y=part["value"], marker={"color": list(SERIES[: len(part)])},
                error_y={
                    "type": "data", "symmetric": False, "array": (part["ci_high"] - part["value"]).fillna(0),
                    "arrayminus": (part["value"] - part["ci_low"]).fillna(0), "thickness": 1,
                },
                showlegend=False, hovertemplate="%{x}: %{y:.3g}<extra></extra>",
            ),
            row=1, col=number + 1,
        )  # fmt: skip
        if part["null"].notna().any():
            figure.add_trace(
                go.Scatter(
                    x=part["units"].str.replace(" ", "<br>"), y=part["null"], mode="markers", name="null",
                    marker={"color": CHANCE, "symbol": "line-ew-open", "size": 26, "line": {"width": 3}},
                    showlegend=number == 0, hovertemplate="null of %{x}: %{y:.3g}<extra></extra>",
                ),
                row=1, col=number + 1,
            )  # fmt: skip
        figure.update_xaxes(tickangle=0, row=1, col=number + 1)
        if not part["value"].any():
            figure.update_yaxes(range=[0, 1], row=1, col=number + 1)  # or an axis of nothing but 0 runs from −1 to 1
    figure.update_layout(height=420)
    return figure
