"""What every expert alone is worth: how the loss rises without it, held against the other experts of its layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.figures import heatmap
from moescope.core.result import Result
from moescope.core.statistics import benjamini_hochberg, bootstrap_ratio, document_weights
from moescope.routing.effects.document_p_values import ratio_p, rho_interval
from moescope.routing.effects.sweep_records import EFFECTS_SQL, Array, SweepRecords, ratios, read_sweep
from moescope.routing.grid import expert_grid, layer_name
from moescope.store.run import Run

_DRAWN = "(drawn at random)"
_ESTIMATE = "delta_nll_estimate"
_SAMPLE = "experts drawn at random"


@analysis(
    name="expert_effects",
    needs=("effects",),
    source="leave-one-out ΔNLL; first-order estimate −gradient · contribution (Taylor expansion, arXiv 1611.06440)",
    section="effects",
    order=20,
)
def expert_effects(
    run: Run, *, sweep: str | None = None, fdr: float = 0.05, draws: Count = 1000, seed: Natural = 0
) -> Result:
    """Which experts does the model need, each taken out alone?

    ΔNLL of an expert is the mean over predicted tokens of the NLL without it less the NLL with everything, nats. Each is held
    against the mean of the other experts of its layer, taken out one at a time in the same way (`null`), and the difference
    has an interval of its own. p is of the test that ΔNLL is 0, by document; q controls the false-discovery rate over all
    experts. Where the sweep was screened, every expert has its first-order estimate, −gradient · contribution, and those
    run exactly show how far it can be relied upon: ρ of Spearman between estimate and ΔNLL, over the experts drawn at random
    (the highest were chosen by the estimate, so that a correlation over them would flatter it) and over all that were run.

    Args:
        sweep: id of the sweep, or how it begins; the newest sweep of experts by default.
        fdr: false-discovery rate at which experts are counted.
        draws: bootstrap resamples of documents.
        seed: of the resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> from moescope.sweep_api import sweep
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     found = sweep(ms.load("demo"), ["Hello world.", "It rains."], store, layers=[5], progress=False)
        ...     sorted(set(found.df()["metric"]))[-1]
        'ΔNLL over the others'
    """
    if not 0 < fdr < 1:
        raise InputError(f"fdr cannot be {fdr:g}", expected="a rate over 0 and under 1")
    records = read_sweep(run, "experts", sweep)
    exact = _exact(records, draws, seed)
    estimates = _estimates(records)
    parts = [part for part in (*exact, estimates) if len(part)]
    screened = len(estimates) > 0
    if screened and exact:
        parts.append(_correlations(records, draws, seed))
    frame = pd.concat(parts, ignore_index=True)
    for name in ("layer", "expert", "rank"):
        frame[name] = frame[name].astype("Int64")
    main = frame[frame["metric"] == "ΔNLL"]
    return Result(
        title=_title(main, estimates, frame, fdr),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=int(main["n"].iloc[0]) if len(main) else int(estimates["n"].iloc[0]),
        n_unit="predicted tokens",
        definition="ΔNLL: mean over predicted tokens of NLL without the expert − NLL, nats. ΔNLL over the others: less the "
        "mean of the other experts of its layer taken out alone. KL(unedited ‖ edited), nats; flips: share of tokens whose most "
        "likely prediction changes. ΔNLL estimate: −gradient · contribution, first order. p by t-test on documents' residuals, q by "
        "Benjamini and Hochberg over all experts run. Rank 1: largest ΔNLL.",
        units={
            "value[ΔNLL]": "nats", "value[ΔNLL over the others]": "nats", "value[KL]": "nats", "value[flips]": "share of tokens",
            "value[ΔNLL estimate]": "nats", "value[rank correlation]": "Spearman's ρ",
        },
        interval=f"95 % percentile bootstrap over documents, {draws} resamples; of ρ over experts drawn at random: by Bonett and Wright "
        "(2000), experts being the sample",
        null="ΔNLL: mean of the layer's other experts taken out alone, in the same way; rank correlation: 0",
        sql=EFFECTS_SQL,
        sql_parameters={"run": run.run_id, "sweep": records.sweep_id},
        computation="sums by document of effect_sequences, resampled",
        notes=_notes(records, main, screened=screened),
    )  # fmt: skip


def _experts(records: SweepRecords, rows: Any) -> pd.DataFrame:
    """layer, block and expert of some rows of a sweep."""
    edits: list[Any] = [found[0] for found in records.frame.loc[rows, "edits"]]
    return pd.DataFrame(
        {"layer": [e.layer for e in edits], "block": [e.block for e in edits], "expert": [e.ids[0] for e in edits]}
    )


def _exact(records: SweepRecords, draws: int, seed: int) -> list[pd.DataFrame]:
    """Rows of the experts that were run."""
    if not records.has("delta_nll"):
        return []
    rows = np.flatnonzero(records.frame["delta_nll"].notna() & (records.frame["kind"] == "target"))
    names = _experts(records, rows)
    totals, n = (part[:, rows] for part in records.sums("delta_nll"))
    value, low, high = ratios(totals, n, draws=draws, seed=seed)
    main = names.assign(metric="ΔNLL", value=value, ci_low=low, ci_high=high, n=n.sum(0).astype(int))
    main["null"] = np.nan
    over = names.assign(metric="ΔNLL over the others", value=np.nan, ci_low=np.nan, ci_high=np.nan, n=main["n"])
    for at in names.groupby(["layer", "block"]).indices.values():
        if len(at) < 2:
            continue
        others = (value[at].sum() - value[at]) / (len(at) - 1)
        main.loc[at, "null"] = others
        excess = (totals[:, at] * len(at) - totals[:, at].sum(1, keepdims=True)) / (len(at) - 1)
        found = bootstrap_ratio(excess, n[:, at], draws=draws, seed=seed)
        over.loc[at, ["value", "ci_low", "ci_high"]] = np.stack(found, -1)
    main["p"] = ratio_p(totals, n)
    main["q"] = benjamini_hochberg(main["p"].to_numpy())
    main["rank"] = pd.Series(value).rank(ascending=False, method="min")
    main["drawn"] = [_DRAWN in name for name in records.frame.loc[rows, "name"]]
    parts = [main, over.dropna(subset=["value"])]
    for metric, name in (("kl", "KL"), ("flips", "flips")):
        part = records.frame.loc[rows]
        columns = {"value": metric, "ci_low": f"{metric}_low", "ci_high": f"{metric}_high"}
        parts.append(names.assign(metric=name, n=main["n"], **{k: part[c].to_numpy(float) for k, c in columns.items()}))
    return parts


def _estimates(records: SweepRecords) -> pd.DataFrame:
    """Rows of what a screening estimated; none where the sweep was exact."""
    if not records.has(_ESTIMATE):
        return pd.DataFrame()
    rows = np.flatnonzero(records.frame[_ESTIMATE].notna())
    part = records.frame.loc[rows]
    found = _experts(records, rows).assign(
        metric="ΔNLL estimate",
        value=part[_ESTIMATE].to_numpy(float),
        ci_low=part[f"{_ESTIMATE}_low"].to_numpy(float),
        ci_high=part[f"{_ESTIMATE}_high"].to_numpy(float),
        n=part["n"].to_numpy(),
    )
    for at in found.groupby(["layer", "block"]).indices.values():
        value = found.loc[at, "value"]
        found.loc[at, "null"] = (value.sum() - value) / max(len(at) - 1, 1)
    return found.assign(rank=found["value"].rank(ascending=False, method="min"))


def _correlations(records: SweepRecords, draws: int, seed: int) -> pd.DataFrame:
    """Spearman's ρ between estimates and exact effects, documents resampled for both at once."""
    exact, estimated = (np.flatnonzero(records.frame[name].notna()) for name in ("delta_nll", _ESTIMATE))
    place = {tuple(row): i for row, i in zip(_experts(records, estimated).to_numpy().tolist(), estimated, strict=True)}
    same = np.array([place[tuple(row)] for row in _experts(records, exact).to_numpy().tolist()])
    first, n = records.sums("delta_nll")
    second, _ = records.sums(_ESTIMATE)
    pairs = np.stack([first[:, exact] / n[:, exact].sum(0), second[:, same] / n[:, exact].sum(0)])
    drawn = np.array([_DRAWN in name for name in records.frame.loc[exact, "name"]])
    found = []
    for label, chosen in ((_SAMPLE, drawn), ("all experts run", np.ones(len(exact), bool))):
        if chosen.sum() < 4:
            continue
        value, low, high = _spearman(pairs[:, :, chosen], draws, seed)
        if np.isnan(value):
            continue  # nothing but ties: there is no order to agree in
        if label == _SAMPLE:
            low, high = rho_interval(value, int(chosen.sum()))
        found.append(
            {
                "metric": "rank correlation", "among": label, "value": value, "ci_low": low, "ci_high": high, "null": 0.0,
                "n": int(chosen.sum()),
            }
        )  # fmt: skip
    return pd.DataFrame(found)


def _spearman(pairs: Array, draws: int, seed: int) -> tuple[float, float, float]:
    """ρ of [2, document, expert] shares, and its interval."""
    from moescope.routing.importance.rank_correlation import spearman

    value = float(spearman(pairs.sum(1))[0, 1])
    if pairs.shape[1] < 2:
        return value, np.nan, np.nan
    weights = document_weights(pairs.shape[1], draws=draws, seed=seed).astype(np.float64)
    resampled = np.einsum("bd,pde->bpe", weights, pairs)
    found = spearman(resampled)[:, 0, 1]
    found = found[np.isfinite(found)]
    if not len(found):
        return value, np.nan, np.nan
    low, high = np.quantile(found, [0.025, 0.975])
    return value, float(low), float(high)


def _title(main: pd.DataFrame, estimates: pd.DataFrame, frame: pd.DataFrame, fdr: float) -> str:
    if not len(main):
        top = estimates.loc[estimates["value"].idxmax()]
        about = f"ΔNLL about {top['value']:.3g} nats"
        return f"By its first-order estimate the model needs {_named(top)} most: {about}; none was run exactly yet"
    worst = main.loc[main["value"].idxmax()]
    harmed = int(((main["q"] < fdr) & (main["value"] > 0)).sum())
    helped = int(((main["q"] < fdr) & (main["value"] < 0)).sum())
    bounds = "" if np.isnan(worst["ci_low"]) else f" ({worst['ci_low']:.3g} to {worst['ci_high']:.3g})"
    text = (
        f"Without {_named(worst)} the NLL rises most, by {worst['value']:.3g} nats{bounds}; taken out alone, {harmed:,} of "
        f"{len(main):,} experts raise it and {helped:,} lower it at a false-discovery rate of {fdr:g}"
    )
    shown = frame[frame["metric"] == "rank correlation"]
    if len(shown):
        row = shown.iloc[0]
        text += f"; estimates rank {row['among']} with ρ = {row['value']:.2f}"
    return text


def _named(row: Any) -> str:
    return f"{layer_name(int(row['layer']), str(row['block']))}·E{int(row['expert'])}"


def _notes(records: SweepRecords, main: pd.DataFrame, *, screened: bool) -> tuple[str, ...]:
    edit: Any = records.frame["edits"].iloc[0][0]
    notes = [f"Experts were taken out by {edit.how} (sweep {records.sweep_id})."]
    if screened:
        notes.append(
            f"Screened: every expert was estimated, {len(main):,} were run exactly; `null` of these is the mean of the others "
            "of the layer that were run."
        )
        if edit.how in ("route_around", "mean", "copy"):
            other = "renormalise" if edit.how == "route_around" else "zero"
            notes.append(f"The estimate is that of {other}: what takes the expert's place is not part of it.")
    return tuple(notes)


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    exact = "ΔNLL estimate" not in set(frame["metric"])
    shown = frame[frame["metric"] == ("ΔNLL" if exact else "ΔNLL estimate")].copy()
    values, rows, columns, fields = expert_grid(shown, "value", extra=("ci_low", "ci_high", "null", "rank"))
    figure = heatmap(
        values,
        x=columns,
        y=rows,
        customdata=fields,
        colorbar=f"ΔNLL{'' if exact else ', estimated'} (nats)",
        hover="%{y}·%{x}: %{z:.4g} nats [%{customdata[0]:.4g}, %{customdata[1]:.4g}]<br>others of the layer %{customdata[2]:.4g}"
        "<br>rank %{customdata[3]:.0f}",
        diverging=True,
    )
    if not exact:
        _mark_run(figure, frame[frame["metric"] == "ΔNLL"])
    figure.update_xaxes(title="expert taken out alone (0: no effect)" + ("" if exact else "; dots: run exactly"))
    figure.update_yaxes(title="layer")
    return figure


def _mark_run(figure: go.Figure, run: pd.DataFrame) -> None:
    """Mark the experts of a screened sweep that were run exactly."""
    places = [layer_name(int(row.layer), str(row.block)) for row in run.itertuples()]
    figure.add_scatter(
        x=[f"E{int(expert)}" for expert in run["expert"]],
        y=places,
        mode="markers",
        marker={"symbol": "circle", "size": 8, "color": "#ffffff", "line": {"width": 1.5, "color": "#212529"}},
        customdata=np.stack([run[name].astype(float) for name in ("value", "ci_low", "ci_high")], axis=-1),
        hovertemplate="%{y}·%{x}: exactly %{customdata[0]:.4g} nats [%{customdata[1]:.4g}, %{customdata[2]:.4g}]<extra></extra>",
        showlegend=False,
    )
