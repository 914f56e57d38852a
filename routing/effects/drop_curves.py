"""Experts taken out, or kept, by score: how the loss goes with their share, beside random sets of the same layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.figures import CHANCE, SERIES, plain
from moescope.core.result import Result
from moescope.core.statistics import bootstrap_ratio
from moescope.routing.effects.sweep_records import EFFECTS_SQL, SweepRecords, read_sweep
from moescope.store.run import Run

_SIZES_SQL = """
    SELECT layer, block, n_experts
    FROM layers
    WHERE run_id = $run AND kind = 'moe'
"""
_DEFINITION = (
    "ΔNLL: mean over predicted tokens of NLL with the experts {done} − NLL with all, nats. Random sets: as many experts of each "
    "layer, drawn at random; null is their mean, null_low and null_high the least and largest of the draws. ΔNLL over random: less "
    "the mean of the random sets. Mean over random: mean of that over the shares measured. {limit}: the {size} share measured at "
    "which ΔNLL is at most {epsilon:g} nats there and at every {other} one; empty where there is none."
)


@analysis(
    name="drop_curves",
    needs=("effects",),
    source="expert pruning curves against random: arXiv 2409.06211 (STUN), arXiv 2402.14800, arXiv 2401.06066",
    section="effects",
    order=30,
)
def drop_curves(
    run: Run, *, sweep: str | None = None, epsilon: float = 0.05, draws: Count = 1000, seed: Natural = 0
) -> Result:
    """How does the loss rise as experts are taken out by score, beside as many random ones?

    Sets grow with the share removed; each stands beside random sets with as many experts of every layer, so that a score is
    held against chance at the same size and place. A score that ranks importance well keeps ΔNLL below the random band when
    the lowest go.

    Args:
        sweep: id of the sweep, or how it begins; the newest of the kind by default.
        epsilon: ΔNLL, nats, up to which experts count as removable.
        draws: bootstrap resamples of documents.
        seed: of the resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> from moescope.sweep_api import sweep
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     found = sweep(ms.load("demo"), ["Hello world.", "It rains."], store, kind="drop", shares=[0.25],
        ...                   scores="frequency", controls=2, progress=False)
        ...     round(float(found.df()["share"][0]), 2)
        0.25
    """
    return _curves(run, "sets", sweep, epsilon, draws, seed)


@analysis(
    name="keep_curves",
    needs=("effects",),
    source="task-specific expert pruning: arXiv 2206.00277; expert-count sweeps: arXiv 2409.01483",
    section="effects",
    order=31,
)
def keep_curves(
    run: Run, *, sweep: str | None = None, epsilon: float = 0.05, draws: Count = 1000, seed: Natural = 0
) -> Result:
    """How few experts of each layer are enough, when those with the highest scores are kept, beside as many random ones?

    Routing goes on among the kept experts by the router's own rule. Every layer keeps the same share, and never fewer than
    a token takes.

    Args:
        sweep: id of the sweep, or how it begins; the newest of the kind by default.
        epsilon: ΔNLL, nats, up to which the kept experts count as enough.
        draws: bootstrap resamples of documents.
        seed: of the resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> from moescope.sweep_api import sweep
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     found = sweep(ms.load("demo"), ["Hello world.", "It rains."], store, kind="keep", shares=[0.5],
        ...                   scores="frequency", controls=2, progress=False)
        ...     round(float(found.df()["share"][0]), 2)
        0.5
    """
    return _curves(run, "keep", sweep, epsilon, draws, seed)


def _curves(run: Run, kind: Any, sweep: str | None, epsilon: float, draws: int, seed: int) -> Result:
    records = read_sweep(run, kind, sweep)
    kept = kind == "keep"
    curves = _points(records, draws, seed)
    frame = pd.concat([curves, *_summaries(curves, records, epsilon, draws, seed, kept=kept)], ignore_index=True)
    frame["kept"] = kept
    sizes = records.frame.groupby("effect_id")["kind"].apply(lambda found: int((found == "control").sum()))
    words = {
        "done": "kept alone" if kept else "taken out",
        "limit": "Enough" if kept else "Removable",
        "size": "smallest" if kept else "largest",
        "other": "larger" if kept else "smaller",
    }
    has_random = bool(sizes.max())
    return Result(
        title=_title(frame, epsilon, kept=kept),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=int(records.frame["n"].max()),
        n_unit="predicted tokens",
        definition=_DEFINITION.format(epsilon=epsilon, **words),
        units={
            "value[ΔNLL]": "nats", "value[ΔNLL over random]": "nats", "value[mean over random]": "nats",
            f"value[{words['limit'].lower()}]": "share of experts", "share": f"share of experts {'kept' if kept else 'removed'}",
            "value[KL]": "nats", "value[flips]": "share of tokens",
        },
        interval=f"95 % percentile bootstrap over documents, {draws} resamples",
        null=f"mean of {int(sizes.max())} random sets with as many experts of each layer" if has_random else "none was run",
        sql=EFFECTS_SQL,
        sql_parameters={"run": run.run_id, "sweep": records.sweep_id},
        computation="sums by document of effect_sequences, resampled",
        notes=_notes(records, kept=kept),
    )  # fmt: skip


def _points(records: SweepRecords, draws: int, seed: int) -> pd.DataFrame:
    """Rows of every share and score."""
    totals, n = records.sums("delta_nll")
    value, low, high = bootstrap_ratio(totals, n, draws=draws, seed=seed)
    size = sum(int(row[2]) for row in records.run.sql(_SIZES_SQL).fetchall())
    found = []
    for effect, rows in records.frame.groupby("effect_id", sort=False).indices.items():
        target = int(rows[records.frame.loc[rows, "kind"] == "target"][0])
        controls = rows[rows != target]
        line = records.frame.loc[target]
        place = {
            "effect": str(effect),
            "set": line["name"],
            "share": sum(len(edit.ids) for edit in line["edits"]) / size,
            "layers": len({edit.layer for edit in line["edits"]}),
            "n": int(n[:, target].sum()),
        }
        null = {"null": np.nan, "null_low": np.nan, "null_high": np.nan}
        if len(controls):
            random = value[controls]
            null = {"null": random.mean(), "null_low": random.min(), "null_high": random.max()}
        found.append(
            {**place, "metric": "ΔNLL", "value": value[target], "ci_low": low[target], "ci_high": high[target], **null}
        )
        if len(controls):
            over = totals[:, [target]] - totals[:, controls].mean(1, keepdims=True)
            v, a, b = (float(x[0]) for x in bootstrap_ratio(over, n[:, [target]], draws=draws, seed=seed))
            found.append({**place, "metric": "ΔNLL over random", "value": v, "ci_low": a, "ci_high": b, "null": 0.0})
        for metric, name in (("kl", "KL"), ("flips", "flips")):
            bounds = {"ci_low": line[f"{metric}_low"], "ci_high": line[f"{metric}_high"]}
            mean = records.frame.loc[controls, metric].mean() if len(controls) else np.nan
            found.append({**place, "metric": name, "value": line[metric], **bounds, "null": mean})
    return pd.DataFrame(found)


def _summaries(
    curves: pd.DataFrame, records: SweepRecords, epsilon: float, draws: int, seed: int, *, kept: bool
) -> list[pd.DataFrame]:
    """One row a score: its mean over random, and how far it goes."""
    totals, n = records.sums("delta_nll")
    found = []
    for label, part in curves[curves["metric"] == "ΔNLL"].groupby("set", sort=False):
        gone = part.sort_values("share", ascending=not kept)
        fine = (gone["value"] <= epsilon).cumprod().astype(bool)
        reached = float(gone.loc[fine, "share"].iloc[-1]) if fine.any() else np.nan
        name = "enough" if kept else "removable"
        if fine.any():
            found.append({"set": label, "metric": name, "value": reached, "n": int(part["n"].max())})
        over = []
        for effect in part["effect"]:
            rows = np.flatnonzero(records.frame["effect_id"] == effect)
            target = rows[records.frame.loc[rows, "kind"] == "target"]
            controls = rows[records.frame.loc[rows, "kind"] == "control"]
            if len(controls):
                over.append(totals[:, target[0]] - totals[:, controls].mean(1))
        if over:
            sums = np.mean(over, axis=0)[:, None]
            v, a, b = (float(x[0]) for x in bootstrap_ratio(sums, n[:, :1], draws=draws, seed=seed))
            row = {"set": label, "metric": "mean over random", "value": v, "ci_low": a, "ci_high": b, "null": 0.0}
            found.append({**row, "n": int(part["n"].max())})
    return [pd.DataFrame(found)] if found else []


def _title(frame: pd.DataFrame, epsilon: float, *, kept: bool) -> str:
    points = frame[frame["metric"] == "ΔNLL"]
    end = points["share"].min() if kept else points["share"].max()
    last = points[np.isclose(points["share"].astype(float), end)]
    best = last.loc[last["value"].idxmin()]
    done = "kept" if kept else "taken out"
    text = f"With {best['share']:.0%} of the experts {done}, {best['set']}, the NLL rises by {best['value']:.3g} nats"
    if not np.isnan(best["ci_low"]):
        text += f" ({best['ci_low']:.3g} to {best['ci_high']:.3g})"
    if not np.isnan(best["null"]):
        text += (
            f"; random sets of the same layers: {best['null']:.3g} ({best['null_low']:.3g} to {best['null_high']:.3g})"
        )
    reached = frame[frame["metric"].isin(["enough", "removable"])]
    if len(reached):
        row = reached.loc[reached["value"].idxmin() if kept else reached["value"].idxmax()]
        text += f"; {row['value']:.0%} {'are enough' if kept else 'can go'} within {epsilon:g} nats"
    return text


def _notes(records: SweepRecords, *, kept: bool) -> tuple[str, ...]:
    edit: Any = records.frame["edits"].iloc[0][0]
    if kept:
        return (f"Routers choose among the kept experts by their own rule (sweep {records.sweep_id}).",)
    return (f"Experts were taken out by {edit.how} (sweep {records.sweep_id}).",)


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    points = frame[frame["metric"] == "ΔNLL"]
    kept = bool(frame["kept"].iloc[0])
    figure = go.Figure()
    drawn: list[tuple[tuple[float, ...], ...]] = []
    same = not points.duplicated(["share"]).any() or points.groupby("share")["null"].nunique().max() <= 1
    for number, (label, given) in enumerate(points.groupby("set", sort=False)):
        part = given.sort_values("share")
        color = SERIES[number % len(SERIES)]
        bounds = tuple(map(tuple, part[["share", "null_low", "null_high"]].to_numpy(float).round(12)))
        if (
            part["null"].notna().any() and bounds not in drawn
        ):  # scores whose sets have the same sizes share their random sets
            drawn.append(bounds)
            _band(figure, part, str(label), alone=same)
        figure.add_scatter(
            x=100 * part["share"], y=part["value"], mode="lines+markers", name=plain(str(label)), line={"color": color},
            error_y={
                "type": "data", "symmetric": False, "array": part["ci_high"] - part["value"],
                "arrayminus": part["value"] - part["ci_low"], "thickness": 1,
            },
            customdata=np.stack([part[c].astype(float) for c in ("ci_low", "ci_high")], axis=-1),
            hovertemplate=plain(str(label)) + "<br>%{x:.3g} %: %{y:.4g} nats [%{customdata[0]:.4g}, %{customdata[1]:.4g}]<extra></extra>",
        )  # fmt: skip
    figure.add_hline(y=0, line={"color": CHANCE, "width": 1})
    figure.update_xaxes(title=f"experts {'kept' if kept else 'taken out'} (% of all)", rangemode="tozero")
    figure.update_yaxes(title="ΔNLL (nats per token)")
    figure.update_layout(height=420)
    return figure


def _band(figure: go.Figure, part: pd.DataFrame, label: str, *, alone: bool) -> None:
    """Least to largest of the random sets, and their mean."""
    name = "random sets of the same layers" if alone else f"random, sizes of {plain(label)}"
    for column, fill in (("null_low", None), ("null_high", "tonexty")):
        figure.add_scatter(
            x=100 * part["share"], y=part[column], mode="lines", line={"width": 0}, fill=fill, showlegend=False,
            fillcolor="rgba(134,142,150,0.22)", hoverinfo="skip",
        )  # fmt: skip
    figure.add_scatter(
        x=100 * part["share"], y=part["null"], mode="lines", name=name, line={"color": CHANCE, "dash": "dash"},
        hovertemplate="random, %{x:.3g} %: %{y:.4g} nats<extra></extra>",
    )  # fmt: skip
