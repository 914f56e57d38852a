"""The anatomy map: what a model is made of, layer by layer, coloured by what was recorded of each sublayer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import analysis
from moescope.core.errors import InputError
from moescope.core.figures import SEQUENTIAL, plain
from moescope.core.result import Result
from moescope.store.run import Run

Measure = Literal[
    "all",
    "router_entropy",
    "router_margin",
    "load_cv",
    "busiest",
    "unused",
    "output_norm",
    "residual_norm",
    "massive_ratio",
    "sink_attention",
    "sink_heads",
    "previous_token",
    "induction",
    "retrieval",
    "sae_fvu",
    "neurons",
]
"""What can colour the map; `all` shows each in a row of its own."""


@dataclass(frozen=True)
class _Measure:
    """One measure: what it is called, its unit, what kind of sublayer has it, and the query of layer, block, value, n."""

    metric: str
    unit: str
    kind: str
    sql: str


# One scan for what is read of every decision.
_DECISIONS = """
    routed AS MATERIALIZED (
        SELECT layer, block, avg(entropy::DOUBLE) AS entropy, avg(margin::DOUBLE) AS margin, count(*) AS n
        FROM routing
        WHERE run_id = $run
        GROUP BY layer, block
    )"""
_ENTROPY = """
    SELECT r.layer, r.block, r.entropy / nullif(ln(l.n_experts + coalesce(l.n_null, 0)), 0) AS value, r.n
    FROM routed r
    JOIN layers l ON l.run_id = $run AND l.layer = r.layer AND l.block = r.block"""
_MARGIN = "SELECT layer, block, margin AS value, n FROM routed"
_LOADS = """
    SELECT layer, block, {value} AS value, sum(tokens)::BIGINT AS n
    FROM (
        SELECT d.layer, d.block, d.expert, sum(d.tokens)::DOUBLE AS tokens, any_value(l.n_experts + coalesce(l.n_null, 0)) AS e
        FROM loads d
        JOIN layers l ON l.run_id = d.run_id AND l.layer = d.layer AND l.block = d.block
        WHERE d.run_id = $run AND d.expert >= 0
        GROUP BY d.layer, d.block, d.expert
    )
    GROUP BY layer, block
    HAVING sum(tokens) > 0"""
_EXPERTS = """
    SELECT layer, block, sum(output_norm_mean * tokens) / sum(tokens) AS value, sum(tokens)::BIGINT AS n
    FROM experts
    WHERE run_id = $run AND expert >= 0 AND output_norm_mean IS NOT NULL AND tokens > 0
    GROUP BY layer, block"""
_NORM = """
    SELECT layer, 'residual' AS block, exp(avg(ln(norm::DOUBLE))) AS value, count(*) AS n
    FROM residual
    WHERE run_id = $run AND norm > 0 AND isfinite(norm)
    GROUP BY layer"""
# A row below the largest |x| by more than the medians of sequences differ cannot hold the largest ratio: few are joined.
_MASSIVE = """
    WITH largest AS (
        SELECT layer, max(abs(top_values[1])) AS x, count(*) AS n
        FROM residual
        WHERE run_id = $run AND isfinite(top_values[1])
        GROUP BY layer
    ),
    medians AS (
        SELECT layer, min(median_abs) AS low, max(median_abs) AS high
        FROM residual_sequences
        WHERE run_id = $run AND median_abs > 0 AND isfinite(median_abs)
        GROUP BY layer
    ),
    few AS (
        SELECT r.token, r.layer, abs(r.top_values[1]) AS x, g.n
        FROM residual r
        JOIN largest g ON g.layer = r.layer
        JOIN medians m ON m.layer = r.layer
        WHERE r.run_id = $run AND isfinite(r.top_values[1]) AND abs(r.top_values[1]) >= 0.999 * g.x * m.low / m.high
    )
    SELECT f.layer, 'residual' AS block, max(f.x / m.median_abs)::DOUBLE AS value, any_value(f.n) AS n
    FROM few f
    JOIN tokens t ON t.run_id = $run AND t.token = f.token
    JOIN residual_sequences m ON m.run_id = $run AND m.sequence_id = t.sequence_id AND m.layer = f.layer
    WHERE m.median_abs > 0
    GROUP BY f.layer"""
_HEADS = """
    SELECT layer, block, {value} AS value, sum(n)::BIGINT AS n
    FROM heads
    WHERE run_id = $run AND condition = 'base' AND metric = '{metric}' AND isfinite(value)
    GROUP BY layer, block"""
_SAE = """
    SELECT layer, block, value, n
    FROM (
        SELECT
            regexp_extract(s.site, '^blocks\\.(\\d+)\\.', 1)::USMALLINT AS layer,
            'autoencoder ' || regexp_replace(s.site, '^blocks\\.\\d+\\.', '') AS block,
            m.value,
            m.n,
            row_number() OVER (PARTITION BY s.site ORDER BY s.created_at DESC NULLS LAST, s.sae_id DESC) AS age
        FROM sae_measures m
        JOIN saes s ON s.sae_id = m.sae_id
        WHERE m.run_id = $run AND m.metric = 'fvu' AND m.condition = 'sae' AND m.group_kind = 'all' AND s.expert IS NULL
            AND regexp_matches(s.site, '^blocks\\.\\d+\\.')
    )
    WHERE age = 1"""
_NEURONS = """
    SELECT layer, block, d_expert::DOUBLE AS value, 1::BIGINT AS n
    FROM layers
    WHERE run_id = $run AND d_expert IS NOT NULL"""

_CV = "sqrt(greatest(sum(tokens * tokens) / any_value(e) - (sum(tokens) / any_value(e)) ** 2, 0)) * any_value(e) / sum(tokens)"

MEASURES: dict[str, _Measure] = {
    "router_entropy": _Measure("router entropy ÷ ln E", "share", "router", _ENTROPY),
    "router_margin": _Measure("mean router margin", "router score", "router", _MARGIN),
    "load_cv": _Measure("CV of expert load", "sd ÷ mean", "router", _LOADS.format(value=_CV)),
    "busiest": _Measure(
        "busiest expert ÷ mean", "ratio", "router", _LOADS.format(value="max(tokens) * any_value(e) / sum(tokens)")
    ),
    "unused": _Measure(
        "experts without a token",
        "share of experts",
        "router",
        _LOADS.format(value="1 - count(*) FILTER (tokens > 0) / any_value(e)::DOUBLE"),
    ),
    "output_norm": _Measure("mean expert output norm", "L2 norm", "router", _EXPERTS),
    "residual_norm": _Measure("residual norm, geometric mean", "L2 norm", "residual", _NORM),
    "massive_ratio": _Measure("largest |x| ÷ median |x|", "ratio", "residual", _MASSIVE),
    "sink_attention": _Measure(
        "attention to the first token", "share", "attention", _HEADS.format(value="avg(value)", metric="alpha_0")
    ),
    "sink_heads": _Measure(
        "heads with a sink (α₀ > 0.3, first 64 tokens)",
        "share of heads",
        "attention",
        _HEADS.format(value="avg((value > 0.3)::DOUBLE)", metric="sink_alpha_0"),
    ),
    "previous_token": _Measure(
        "largest previous-token score", "share", "attention", _HEADS.format(value="max(value)", metric="previous token")
    ),
    "induction": _Measure(
        "largest induction score", "share", "attention", _HEADS.format(value="max(value)", metric="induction")
    ),
    "retrieval": _Measure(
        "largest retrieval score", "share", "attention", _HEADS.format(value="max(value)", metric="retrieval score")
    ),
    "sae_fvu": _Measure("variance an autoencoder leaves", "share", "autoencoder", _SAE),
    "neurons": _Measure("neurons of an expert or MLP", "neurons", "MLP", _NEURONS),
}
assert set(MEASURES) == set(get_args(Measure)) - {"all"}

_PLACES = "SELECT layer, block, kind FROM layers WHERE run_id = $run ORDER BY layer, block"
_GREY = "#adb5bd"


@analysis(
    name="anatomy_map",
    needs=("layers",),
    source="each measure as its own analysis defines it: router_entropy, balance, load, residual_norms, attention_sinks, …",
    section="overview",
    order=10,
)
def anatomy_map(run: Run, *, measure: Measure = "all") -> Result:
    """What is each layer made of, and where in depth does what was measured of it stand out?

    One number a sublayer and measure. Routers: mean entropy of the router's distribution over ln E; mean margin; coefficient
    of variation of the experts' tokens, the busiest expert over their mean, the share of experts without a token; mean L2 norm
    of expert outputs. Residual stream: geometric mean of the L2 norm at the block's output; the largest |x| over the median |x| of its
    sequence. Attention: mean share that goes to the first token, share of heads that give it more than 0.3 within the first 64
    tokens of a text, the largest previous-token, induction and retrieval score of a head. Autoencoders: share of variance left
    unexplained by the newest autoencoder of each site that was judged on the run; those of a single expert are left out. MLPs:
    neurons.

    Args:
        measure: which of them colours the map; all of them, each in a row of its own.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world."], store, name="first", progress=False)
        ...     ms.analyze(run, "anatomy_map", measure="residual_norm").df().layer.tolist()
        [0, 1, 2, 3, 4, 5]
    """
    sql = _query(list(MEASURES) if measure == "all" else [measure])
    frame = run.sql(sql).df()
    if frame.empty:
        recorded = sorted({str(name) for name in run.sql(_query(list(MEASURES))).df()["measure"]})
        raise InputError(
            f"run {run.name!r} has no {MEASURES[measure].metric}"
            if measure != "all"
            else "nothing was measured by layer",
            found=f"recorded: {', '.join(recorded)}" if recorded else "a run without layers",
            fix="choose a measure that was recorded, or record with the probe that gives it: routing, experts, residual, "
            "attention",
        )
    places = run.sql(_PLACES).df()
    shown = [name for name in MEASURES if (frame["measure"] == name).any()]
    return Result(
        title=_title(frame, shown),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=lambda result: _all(result) if measure == "all" else _one(result, places),
        n=len(frame),
        n_unit="sublayer × measure pairs" if measure == "all" else "sublayers",
        definition="One number a sublayer and measure, over all tokens of the run: "
        + "; ".join(f"{MEASURES[name].metric} ({MEASURES[name].kind})" for name in shown)
        + ("." if measure != "all" else ". Each row has its own colours, from its smallest to its largest value."),
        units={f"value[{MEASURES[name].metric}]": MEASURES[name].unit for name in shown},
        sql=_query(shown),
        sql_parameters={"run": run.run_id},
    )


def _query(names: list[str]) -> str:
    """The numbers of these measures, long; names and texts are this module's own."""
    parts = [
        f"SELECT {number} AS place, '{name}' AS measure, '{MEASURES[name].kind}' AS kind, layer, block, "
        f"'{MEASURES[name].metric}' AS metric, value, n\nFROM ({MEASURES[name].sql}\n)\nWHERE isfinite(value)"
        for number, name in enumerate(names)
    ]
    scan = {"router_entropy", "router_margin"} & set(names)
    return (
        (f"WITH {_DECISIONS}\n" if scan else "")
        + "SELECT measure, kind, layer, block, metric, value, n\nFROM (\n"
        + "\nUNION ALL\n".join(parts)
        + "\n)\nORDER BY place, layer, block"
    )


def _title(frame: pd.DataFrame, shown: list[str]) -> str:
    layers = frame["layer"].nunique()
    if len(shown) > 1:
        return f"{len(shown)} measures of {layers} layers, from the first to the last"
    low, high = frame.loc[frame["value"].idxmin()], frame.loc[frame["value"].idxmax()]
    metric = MEASURES[shown[0]].metric
    if low["value"] == high["value"]:
        where = f"in all of {layers} layers" if layers > 1 else f"in L{high['layer']}"
        return f"{metric[:1].upper()}{metric[1:]}: {_written(high['value'])} {where}"
    return (
        f"{metric[:1].upper()}{metric[1:]} is smallest in L{low['layer']} ({_written(low['value'])}) and largest in "
        f"L{high['layer']} ({_written(high['value'])})"
    )


def _written(value: float) -> str:
    """Three digits, and large numbers in full: 1,536 rather than 1.54e+03."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:,.3g}"


def _all(result: Result) -> go.Figure:
    """A row a measure, each on its own scale, which its name tells."""
    frame = result.df()
    frame["row"] = [
        f"{metric}{'' if block in ('mlp', 'attn', 'residual') else ' ' + plain(block.removeprefix('autoencoder '))}"
        for metric, block in zip(frame["metric"], frame["block"], strict=True)
    ]
    rows = list(dict.fromkeys(frame["row"]))
    layers = sorted(map(int, frame["layer"].unique()))
    values = np.full((len(rows), len(layers)), np.nan)
    at = frame["row"].map(rows.index), frame["layer"].astype(int).map(layers.index)
    values[at] = frame["value"]
    low, high = np.nanmin(values, 1, keepdims=True), np.nanmax(values, 1, keepdims=True)
    scaled = np.divide(values - low, high - low, out=np.full_like(values, 0.5), where=high > low)
    scaled[np.isnan(values)] = np.nan
    names = [
        f"{row}  {_written(a)}" + (f" – {_written(b)}" if b > a else "")
        for row, a, b in zip(rows, low[:, 0], high[:, 0], strict=True)
    ]
    figure = go.Figure(
        go.Heatmap(
            z=scaled,
            x=[f"L{layer}" for layer in layers],
            y=names,
            zmin=0,
            zmax=1,
            colorscale=SEQUENTIAL,
            customdata=values,
            colorbar={"title": {"text": "in its row", "side": "right"}, "thickness": 14, "tickvals": [0, 1]}
            | {"ticktext": ["lowest", "highest"]},
            hovertemplate="%{x}, %{y}: %{customdata:,.4g}<extra></extra>",
            xgap=1,
            ygap=2,
        )
    )
    return _shaped(figure, len(layers), len(rows))


def _one(result: Result, places: pd.DataFrame) -> go.Figure:
    """Layers by sublayer; sublayers without the measure in grey."""
    frame = result.df()
    kinds = {(int(p.layer), str(p.block)): str(p.kind) for p in places.itertuples()}
    rows = list(dict.fromkeys([*(block for _, block in kinds), *frame["block"].astype(str)]))
    layers = sorted({*(layer for layer, _ in kinds), *frame["layer"].astype(int)})
    shape = (len(rows), len(layers))
    values, there = np.full(shape, np.nan), np.full(shape, np.nan)
    words = np.full(shape, "", dtype=object)
    for (layer, block), kind in kinds.items():
        place = rows.index(block), layers.index(layer)
        there[place], words[place] = 0.0, plain(kind)
    for row in frame.itertuples():
        place = rows.index(str(row.block)), layers.index(int(row.layer))
        values[place], there[place] = row.value, np.nan
        words[place] = words[place] or plain(str(row.kind))
    x, y = [f"L{layer}" for layer in layers], [plain(row) for row in rows]
    gaps = {"xgap": 1, "ygap": 2, "x": x, "y": y, "customdata": words}
    figure = go.Figure(
        go.Heatmap(
            z=there,
            colorscale=[[0, _GREY], [1, _GREY]],
            opacity=0.35,
            showscale=False,
            hovertemplate="%{x} %{y}, %{customdata}: has no such measure<extra></extra>",
            **gaps,
        )
    )
    metric = str(frame["metric"].iloc[0])
    unit = next(iter(result.units.values()))
    figure.add_heatmap(
        z=values,
        colorscale=SEQUENTIAL,
        colorbar={"title": {"text": f"{metric} ({unit})", "side": "right"}, "thickness": 14},
        hovertemplate="%{x} %{y}, %{customdata}: %{z:,.4g}<extra></extra>",
        **gaps,
    )
    return _shaped(figure, len(layers), len(rows))


def _shaped(figure: go.Figure, layers: int, rows: int) -> go.Figure:
    figure.update_xaxes(type="category", title="layer", nticks=min(layers, 32), side="bottom")
    figure.update_yaxes(type="category", autorange="reversed", automargin=True)
    figure.update_layout(height=max(240, 130 + 26 * rows))
    return figure
