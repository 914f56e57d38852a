"""Other numbers of experts a token, in each layer alone and in all; and what the router's choice is worth beside chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.figures import CHANCE, SERIES
from moescope.core.result import Result
from moescope.core.statistics import bootstrap_ratio
from moescope.routing.effects.sweep_records import EFFECTS_SQL, SweepRecords, read_sweep
from moescope.routing.grid import layer_name
from moescope.store.run import Run

ALL = "all layers"
_OWN_SQL = """
    SELECT max(top_k)
    FROM layers
    WHERE run_id = $run AND kind = 'moe'
"""


@analysis(
    name="routing_width",
    needs=("effects",),
    source="fewer or more active experts: arXiv 2401.06066 (top-k); arXiv 2403.07652 (top-p)",
    section="effects",
    order=40,
)
def routing_width(run: Run, *, sweep: str | None = None, draws: Count = 1000, seed: Natural = 0) -> Result:
    """How many experts does a token need, in each layer alone and in all at once?

    A sweep of `top_k` gives every token the k experts with the largest selection scores, weights by the router's own rule; one
    of `top_p` gives it as few as reach a share p of its scores. ΔNLL is against the model's own number of experts (`null`,
    0). The sum of the layers' effects, each alone, beside that of all at once says how far they add up.

    Args:
        sweep: id of the sweep, or how it begins; the newest of the kind by default.
        draws: bootstrap resamples of documents.
        seed: of the resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> from moescope.sweep_api import sweep
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     found = sweep(ms.load("demo"), ["Hello world."], store, kind="top_k", numbers=[1], progress=False)
        ...     found.df()["place"][0]
        'all layers'
    """
    records = read_sweep(run, "width", sweep)
    first: Any = records.frame["edits"].iloc[0][0]
    by_number = first.kind == "top_k"
    settings = [edits[0].k if by_number else edits[0].p for edits in records.frame["edits"]]
    frame = _by_place(records, draws, seed).assign(setting=np.repeat(settings, 3))
    own = int(run.sql(_OWN_SQL).fetchall()[0][0])
    sums = _added_up(records, settings, draws, seed)
    table = pd.concat([frame, sums], ignore_index=True)
    table["layer"] = table["layer"].astype("Int64")
    what = "k" if by_number else "p"
    return Result(
        title=_width_title(frame, what, own),
        table=pa.Table.from_pandas(table.assign(by=what, own=own), preserve_index=False),
        draw=_draw_width,
        n=int(records.frame["n"].max()),
        n_unit="predicted tokens",
        definition=f"ΔNLL: mean over predicted tokens of NLL with the setting {what} − NLL of the model as it is, nats; KL(unedited ‖ "
        "edited), nats; flips: share of tokens whose most likely prediction changes. Sum of layers: ΔNLL of the layers, each alone, "
        "added up.",
        units={"value[ΔNLL]": "nats", "value[KL]": "nats", "value[flips]": "share of tokens", "value[sum of layers]": "nats",
               "setting": "experts a token" if by_number else "share of scores"},
        interval=f"95 % percentile bootstrap over documents, {draws} resamples",
        null=f"the model's own {own} experts a token: 0",
        sql=EFFECTS_SQL,
        sql_parameters={"run": run.run_id, "sweep": records.sweep_id},
        computation="sums by document of effect_sequences, resampled",
        notes=(f"Sweep {records.sweep_id}.",),
    )  # fmt: skip


@analysis(
    name="routing_value",
    needs=("effects",),
    source="random routing as the control of a router: arXiv 2402.01739, arXiv 2106.04426",
    section="effects",
    order=45,
)
def routing_value(run: Run, *, sweep: str | None = None, draws: Count = 1000, seed: Natural = 0) -> Result:
    """What is the routers' choice worth, against random experts with the same weights?

    Every token takes k experts at random, its own slots' weights staying in their order, in one layer or in all. The value of
    routing is the NLL under random routing less the NLL with the router's own choice, the mean over seeds; documents and
    seeds are resampled together. `null` is 0: a router that is no better than chance.

    Args:
        sweep: id of the sweep, or how it begins; the newest of the kind by default.
        draws: resamples of documents and seeds.
        seed: of the resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> from moescope.sweep_api import sweep
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     found = sweep(ms.load("demo"), ["Hello world."], store, kind="routing_value", controls=2, progress=False)
        ...     found.df()["place"][0]
        'all layers'
    """
    records = read_sweep(run, "random", sweep)
    frame = _over_seeds(records, draws, seed)
    seeds = len({edits[0].seed for edits in records.frame["edits"]})
    return Result(
        title=_value_title(frame, seeds),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw_value,
        n=int(records.frame["n"].max()),
        n_unit="predicted tokens",
        definition="Value of routing: mean over seeds and predicted tokens of NLL with k random experts a token − NLL with the router's "
        "choice, nats. least, largest: of the seeds.",
        units={"value": "nats", "least": "nats", "largest": "nats", "share": "share of the value in all layers"},
        interval=f"95 % percentile bootstrap over documents and seeds, {draws} resamples",
        null="a router no better than chance: 0",
        sql=EFFECTS_SQL,
        sql_parameters={"run": run.run_id, "sweep": records.sweep_id},
        computation="sums by document of effect_sequences, documents and seeds resampled",
        notes=(f"{seeds} seeds a place (sweep {records.sweep_id}).",),
    )  # fmt: skip


def places(records: SweepRecords) -> pd.DataFrame:
    """layer, block and label of every intervention: one router, or all."""
    found = []
    for edits in records.frame["edits"]:
        one: Any = edits[0] if len(edits) == 1 else None
        place = (None, None, ALL) if one is None else (one.layer, one.block, layer_name(one.layer, one.block))
        found.append(place)
    return pd.DataFrame(found, columns=["layer", "block", "place"])


def _by_place(records: SweepRecords, draws: int, seed: int) -> pd.DataFrame:
    totals, n = records.sums("delta_nll")
    value, low, high = bootstrap_ratio(totals, n, draws=draws, seed=seed)
    rows = []
    for number, place in enumerate(places(records).to_dict("records")):
        line = records.frame.loc[number]
        tokens = {"null": 0.0, "n": int(line["n"])}
        rows.append(
            {
                **place,
                "metric": "ΔNLL",
                "value": value[number],
                "ci_low": low[number],
                "ci_high": high[number],
                **tokens,
            }
        )
        for metric, name in (("kl", "KL"), ("flips", "flips")):
            bounds = {"ci_low": line[f"{metric}_low"], "ci_high": line[f"{metric}_high"]}
            rows.append({**place, "metric": name, "value": line[metric], **bounds, **tokens})
    return pd.DataFrame(rows)


def _added_up(records: SweepRecords, settings: Sequence[float], draws: int, seed: int) -> pd.DataFrame:
    """What the layers add up to, where each was run alone."""
    totals, n = records.sums("delta_nll")
    alone = places(records)["layer"].notna().to_numpy()
    rows = []
    for setting in dict.fromkeys(settings):
        at = np.flatnonzero(alone & np.isclose(settings, setting))
        if len(at) < 2:
            continue
        added = totals[:, at].sum(1, keepdims=True)
        value, low, high = (float(x[0]) for x in bootstrap_ratio(added, n[:, at[:1]], draws=draws, seed=seed))
        row = {"place": ALL, "metric": "sum of layers", "value": value, "ci_low": low, "ci_high": high}
        rows.append({**row, "setting": setting, "n": int(n[:, at[0]].sum())})
    return pd.DataFrame(rows)


def _over_seeds(records: SweepRecords, draws: int, seed: int) -> pd.DataFrame:
    totals, n = records.sums("delta_nll")
    generator = np.random.default_rng(seed)
    named = places(records)
    rows = []
    for label, at in named.groupby("place", sort=False).indices.items():
        means = totals[:, at].sum(0) / n[:, at].sum(0)
        picked = generator.integers(0, len(at), (draws, len(at)))
        weights = generator.multinomial(len(totals), np.full(len(totals), 1 / len(totals)), size=draws).astype(float)
        top = np.einsum("bd,dbs->b", weights, totals[:, at][:, picked])
        bounds = np.nanquantile(top / (weights @ n[:, at[0]] * len(at)), [0.025, 0.975])
        low, high = bounds if len(totals) > 1 else (np.nan, np.nan)
        rows.append(
            {
                **named.loc[at[0]].to_dict(), "place": label, "metric": "value of routing", "value": float(means.mean()),
                "ci_low": float(low), "ci_high": float(high), "null": 0.0, "least": float(means.min()),
                "largest": float(means.max()), "n": int(n[:, at[0]].sum()),
            }
        )  # fmt: skip
    frame = pd.DataFrame(rows)
    whole = frame.loc[frame["place"] == ALL, "value"]
    some = len(whole) > 0 and float(whole.iloc[0]) > 0
    frame["share"] = frame["value"] / float(whole.iloc[0]) if some else np.nan
    frame["layer"] = frame["layer"].astype("Int64")
    return frame


def _width_title(frame: pd.DataFrame, what: str, own: int) -> str:
    points = frame[(frame["metric"] == "ΔNLL")]
    whole = points[points["place"] == ALL] if (points["place"] == ALL).any() else points
    least = whole.loc[whole["setting"].idxmin()]
    bounds = "" if np.isnan(least["ci_low"]) else f" ({least['ci_low']:.3g} to {least['ci_high']:.3g})"
    setting = f"{what} = {least['setting']:g}"
    text = f"With {setting} in {least['place']} the NLL changes by {least['value']:.3g} nats{bounds} against the model's own top-{own}"
    single = points[(points["place"] != ALL) & (points["setting"] == least["setting"])]
    if len(single) > 1:
        worst = single.loc[single["value"].idxmax()]
        text += f"; alone, {worst['place']} needs its experts most ({worst['value']:.3g} nats)"
    return text


def _value_title(frame: pd.DataFrame, seeds: int) -> str:
    row = frame.iloc[0]
    bounds = "" if np.isnan(row["ci_low"]) else f" ({row['ci_low']:.3g} to {row['ci_high']:.3g})"
    text = (
        f"Choosing experts at random in {row['place']} costs {row['value']:.3g} nats a token{bounds} over {seeds} seeds"
    )
    single = frame[frame["place"] != ALL]
    if len(single) > 1:
        best, least = (single.loc[single["value"].idxmax()], single.loc[single["value"].idxmin()])
        text += f"; in one layer alone, between {least['value']:.3g} ({least['place']}) and {best['value']:.3g} ({best['place']})"
    return text


def _draw_width(result: Result) -> go.Figure:
    frame = result.df()
    what = str(frame["by"].iloc[0])
    points = frame[frame["metric"] == "ΔNLL"]
    figure = go.Figure()
    labels = list(dict.fromkeys(points["place"]))
    for number, label in enumerate(labels):
        part = points[points["place"] == label].sort_values("setting")
        whole = label == ALL
        figure.add_scatter(
            x=part["setting"], y=part["value"], mode="lines+markers", name=label,
            line={"color": SERIES[0] if whole else SERIES[1:][(number - 1) % (len(SERIES) - 1)], "width": 3 if whole else 1.5},
            opacity=1 if whole or len(labels) < 8 else 0.7,
            error_y={
                "type": "data", "symmetric": False, "array": part["ci_high"] - part["value"],
                "arrayminus": part["value"] - part["ci_low"], "thickness": 1, "visible": whole or len(labels) < 8,
            },
            hovertemplate=f"{label}, {what} = %{{x}}: %{{y:.4g}} nats<extra></extra>",
        )  # fmt: skip
    figure.add_hline(y=0, line={"color": CHANCE, "dash": "dash"})
    own = float(frame["own"].iloc[0])
    if what == "k":
        figure.add_scatter(
            x=[own], y=[0.0], mode="markers", name="as the model is", hoverinfo="skip",
            marker={"symbol": "diamond", "size": 10, "color": CHANCE},
        )  # fmt: skip
    figure.update_xaxes(title="experts a token (k)" if what == "k" else "share of scores reached (p)")
    if what == "k":
        figure.update_xaxes(dtick=1)
    figure.update_yaxes(title="ΔNLL (nats per token)")
    figure.update_layout(height=420)
    return figure


def _draw_value(result: Result) -> go.Figure:
    frame = result.df()
    figure = go.Figure(
        go.Bar(
            x=frame["place"], y=frame["value"], marker={"color": SERIES[0]}, name="value of routing",
            error_y={
                "type": "data", "symmetric": False, "array": frame["ci_high"] - frame["value"],
                "arrayminus": frame["value"] - frame["ci_low"], "thickness": 1,
            },
            customdata=np.stack([frame[c].astype(float) for c in ("least", "largest")], axis=-1),
            hovertemplate="%{x}: %{y:.4g} nats<br>seeds from %{customdata[0]:.4g} to %{customdata[1]:.4g}<extra></extra>",
        )
    )  # fmt: skip
    figure.add_scatter(
        x=frame["place"], y=[0.0] * len(frame), mode="lines", name="no better than chance", hoverinfo="skip",
        line={"color": CHANCE, "dash": "dash"},
    )  # fmt: skip
    figure.update_xaxes(title="where experts are chosen at random", type="category")
    figure.update_yaxes(title="value of routing (nats per token)")
    figure.update_layout(height=400)
    return figure
