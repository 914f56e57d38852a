"""Autoencoders of one site side by side: what each loses for the latents it spends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import analysis
from moescope.core.figures import CHANCE, SERIES, plain
from moescope.core.result import Result
from moescope.routing.features.quality_tables import JUDGED_SQL, judged_frame, one_site, spread_ticks, wide
from moescope.store.run import Run

_CONTROL = {"probe_loss": "random_direction", "ablation_sparsity": "random_direction", "absorption": "shuffled"}
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")


@analysis(
    name="sae_comparison",
    needs=("sae_measures",),
    source="frontier of reconstruction over sparsity: arXiv 2406.04093, 2407.14435",
    section="features",
    order=14,
)
def sae_comparison(run: Run, *, site: str | None = None) -> Result:
    """Which autoencoder of a site loses least for the latents it spends?

    All autoencoders that were judged on the run at one site: FVU, ΔCE, loss recovered, dead latents and the other measures of
    `sae_quality`, over the mean number of active latents (L0). On the frontier is one that no other beats in both FVU and L0.

    Args:
        site: where; the site with most judged autoencoders where not given.

    Raises:
        InputError: none was judged there.

    Example:
        >>> import moescope as ms
        >>> ms.analyze(run, "sae_comparison").df()  # doctest: +SKIP
    """
    frame, where = one_site(judged_frame(run), site)
    sizes = wide(frame)
    table = _table(frame, sizes)
    best = sizes.loc[sizes["fvu"].idxmin()]
    ahead = int(table.drop_duplicates("sae")["frontier"].sum())
    return Result(
        title=f"Of {len(sizes):,} autoencoder{'s' * (len(sizes) != 1)} at {where}, {best['sae']} leaves least variance: "
        f"{100 * best['fvu']:.3g} % with {best['l0']:.3g} latents a vector; {ahead:,} on the frontier of FVU and L0",
        table=pa.Table.from_pandas(table, preserve_index=False),
        draw=_draw,
        n=len(sizes),
        n_unit="autoencoders",
        definition="Measures as in sae_quality, over all judged tokens. Frontier: no other has both a lower FVU and as low an L0.",
        units={"l0": "latents a vector", "d_sae": "latents"}
        | {f"value[{m}]": u for m, u in dict(zip(frame["metric"], frame["unit"], strict=True)).items()},
        interval="95 % percentile bootstrap over documents, 1,000 resamples; shares of latents have none",
        null="PCA with as many components as the autoencoder's mean L0; for probes and ablations a random direction, for absorption "
        "shuffled decoder rows",
        sql=JUDGED_SQL,
        sql_parameters={"run": run.run_id},
        computation="rows of one site, each beside its control",
        notes=(f"Autoencoders judged on run {run.name} at {where}.",),
    )


def _table(frame: pd.DataFrame, sizes: pd.DataFrame) -> pd.DataFrame:
    """A row an autoencoder and measure."""
    frontier = {
        sae_id: not ((sizes["fvu"] < row["fvu"]) & (sizes["l0"] <= row["l0"])).any() for sae_id, row in sizes.iterrows()
    }
    controls = frame.set_index(["sae_id", "metric", "condition"])["value"].to_dict()
    rows: list[dict[str, Any]] = []
    for row in frame[frame["condition"] == "sae"].to_dict("records"):
        wanted = _CONTROL.get(row["metric"], "pca")
        rows.append(
            {
                "sae": row["sae"], "architecture": row["architecture"], "d_sae": row["d_sae"], "l0": sizes.loc[row["sae_id"], "l0"],
                "metric": row["metric"], "value": row["value"], "ci_low": row["ci_low"], "ci_high": row["ci_high"],
                "null": controls.get((row["sae_id"], row["metric"], wanted), np.nan),
                "pca_topk": controls.get((row["sae_id"], row["metric"], "pca_topk"), np.nan),
                "frontier": frontier[row["sae_id"]], "n": row["n"],
            }
        )  # fmt: skip
    return pd.DataFrame(rows).sort_values(["metric", "l0", "d_sae", "sae"], kind="stable", ignore_index=True)


def _draw(result: Result) -> go.Figure:
    """FVU, and ΔCE where it was measured, over L0; PCA with as many components beside them."""
    from plotly.subplots import make_subplots

    frame = result.df()
    shown = [("fvu", "FVU (share of variance left)")]
    shown += [("delta_ce", "ΔCE (nats per token)")] if (frame["metric"] == "delta_ce").any() else []
    figure = make_subplots(rows=1, cols=len(shown), horizontal_spacing=0.12)
    kinds = list(dict.fromkeys(frame["architecture"].astype(str)))
    for column, (metric, unit) in enumerate(shown, start=1):
        part = frame[frame["metric"] == metric].sort_values("l0")
        for control, name, dash in (
            ("null", "PCA, the first k", "dot"),
            ("pca_topk", "PCA, each vector's largest k", "dash"),
        ):
            line = part.assign(k=part["l0"].round()).groupby("k")[control].mean().dropna()
            if len(line):
                figure.add_trace(
                    go.Scatter(
                        x=line.index, y=line, mode="lines+markers", line={"color": CHANCE, "dash": dash}, name=name,
                        marker={"size": 4}, legendgroup=name, showlegend=column == 1,
                        hovertemplate=f"{name}, k = %{{x:.3g}}: %{{y:.4g}}<extra></extra>",
                    ),
                    row=1, col=column,
                )  # fmt: skip
        for number, kind in enumerate(kinds):
            mine = part[part["architecture"].astype(str) == kind]
            if len(mine):
                figure.add_trace(_points(mine, kind, number, shown=column == 1), row=1, col=column)
        figure.update_xaxes(title="L0 (latents a vector, log scale)", type="log", row=1, col=column)
        figure.update_yaxes(title=unit, rangemode="tozero", row=1, col=column)
    ticks = spread_ticks(frame["l0"].dropna().to_numpy(float))
    figure.update_xaxes(tickvals=ticks, ticktext=[f"{tick:,.3g}" for tick in ticks])
    figure.update_layout(height=440)
    return figure


def _points(part: pd.DataFrame, kind: str, number: int, *, shown: bool) -> go.Scatter:
    value = part["value"]
    low, high = part["ci_low"].fillna(value), part["ci_high"].fillna(value)
    return go.Scatter(
        x=part["l0"], y=value, mode="markers", name=plain(kind), legendgroup=kind, showlegend=shown,
        marker={"color": SERIES[number % len(SERIES)], "size": 9, "symbol": _SYMBOLS[number % len(_SYMBOLS)]},
        error_y={"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "thickness": 1},
        customdata=[[plain(str(name)), size] for name, size in zip(part["sae"], part["d_sae"], strict=True)],
        hovertemplate="%{customdata[0]} (%{customdata[1]:,} latents), L0 %{x:.3g}: %{y:.4g}<extra></extra>",
    )  # fmt: skip
