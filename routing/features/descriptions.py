"""Descriptions of units in words, with what each of them is worth."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import Count, analysis
from moescope.core.errors import InputError
from moescope.core.figures import CHANCE, SERIES, plain
from moescope.core.result import Result
from moescope.store.run import Run

_KINDS = {"latent": "latents", "expert": "experts", "neuron": "neurons", "head": "heads"}
_NONE = "not scored"
_SHOWN = 46  # characters of a description along the axis

_SQL = """
    SELECT d.unit_kind, a.name AS sae, d.layer, d.block, d.unit, d.text AS description, d.describer, s.scorer,
        coalesce(s.metric, 'not scored') AS metric,
        any_value(s.value) AS value, any_value(s.ci_low) AS ci_low, any_value(s.ci_high) AS ci_high,
        max(s.null_value) FILTER (WHERE s.null_kind = 'chance') AS "null",
        max(s.null_value) FILTER (WHERE s.null_kind LIKE 'another %') AS control,
        any_value(s.n) AS n
    FROM descriptions d
    LEFT JOIN description_scores s ON s.description_id = d.description_id AND s.metric NOT LIKE '%\\_unread' ESCAPE '\\'
    LEFT JOIN saes a ON a.sae_id = d.sae_id
    WHERE d.run_id = $run
        AND ($describer IS NULL OR d.describer = $describer)
        AND ($unit_kind IS NULL OR d.unit_kind = $unit_kind)
        AND ($sae IS NULL OR d.sae_id IS NULL OR a.name = $sae OR CAST(d.sae_id AS VARCHAR) = $sae)
    GROUP BY d.description_id, d.unit_kind, a.name, d.layer, d.block, d.unit, d.text, d.describer, s.scorer, s.metric
    ORDER BY d.unit_kind, a.name, d.layer, d.block, d.unit, d.describer, s.metric
"""
_NEWEST_SQL = """
    SELECT CAST(d.sae_id AS VARCHAR)
    FROM descriptions d
    LEFT JOIN saes a ON a.sae_id = d.sae_id
    WHERE d.run_id = $run AND d.sae_id IS NOT NULL
    ORDER BY a.created_at DESC NULLS LAST, d.created_at DESC
    LIMIT 1
"""


@analysis(
    name="descriptions",
    needs=("descriptions",),
    source="descriptions: survey arXiv 2510.01048; detection and fuzzing: Paulo et al. 2024, arXiv 2410.13928",
    section="features",
    order=45,
)
def descriptions(
    run: Run,
    *,
    unit_kind: Literal["latent", "expert", "neuron", "head"] | None = None,
    describer: str | None = None,
    sae: str | None = None,
    units: Count = 25,
) -> Result:
    """What do descriptions say that units respond to, and does it tell where they are active?

    A description is worth what a reader can foretell with it: in which texts the unit is active (detection), on which tokens
    (fuzzing), and which words lose probability when the unit is taken out (causal). Each score stands beside the same one
    with another unit's description: a description that fits everything scores no better than that.

    Args:
        unit_kind: of the units; None for all kinds.
        describer: whose descriptions; None for all.
        sae: autoencoder of the latents, its name or id; the newest described by default.
        units: drawn in the figure, those of highest score; the table has all.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> from moescope.sae.concepts.describe import describe
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["one two three", "four five six"] * 8, store, name="first", progress=False)
        ...     found = describe(store, run, complete=lambda prompt: "DESCRIPTION: numbers in words", units=[15],
        ...                      unit_kind="expert", layer=1, scores=(), progress=False)
        ...     ms.analyze(run, "descriptions").df()["description"][0]
        'numbers in words'
    """
    newest = run.sql(_NEWEST_SQL).fetchall()
    given: dict[str, Any] = {
        "run": run.run_id, "describer": describer, "unit_kind": unit_kind, "sae": sae or (newest[0][0] if newest else None),
    }  # fmt: skip
    frame = run.store.sql(_SQL, given).df()
    if not len(frame):
        known = run.sql(
            "SELECT DISTINCT describer, unit_kind FROM descriptions WHERE run_id = $run ORDER BY 1"
        ).fetchall()
        raise InputError(
            f"run {run.name!r} has no such descriptions",
            found="; ".join(f"{kind}s by {who}" for who, kind in known) or "none",
            fix="moescope sae describe writes some",
        )
    for column in ("value", "ci_low", "ci_high", "null", "control"):
        frame[column] = frame[column].astype(float)
    frame["name"] = [_name(row) for row in frame.to_dict("records")]
    described = frame.drop_duplicates(["unit_kind", "sae", "layer", "block", "unit", "describer"])
    return Result(
        title=_title(frame, len(described)),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_Draw(units),
        n=len(described),
        n_unit="descriptions",
        definition="detection: balanced accuracy of telling passages on which the unit is active from as many on which it is not, by the "
        "description alone; fuzzing: of telling passages whose active tokens are marked from passages with as many silent tokens "
        "marked; documents other than those the describer saw. causal: log p lost, as the next token, by words named from the "
        "description when the unit is taken out, mean over its active tokens. control: the same with another unit's description.",
        units={"value[detection]": "share", "value[fuzzing]": "share", "value[causal]": "nats a token"},
        interval="95 % percentile bootstrap over documents",
        null="½ for detection and fuzzing; none for causal, whose control is another unit's description",
        sql=_SQL,
        sql_parameters=given,
        notes=_notes(frame),
    )  # fmt: skip


def _name(row: dict[str, Any]) -> str:
    place = "" if pd.isna(row["layer"]) else f"L{int(row['layer'])}·"
    letter = {"expert": "E", "head": "H"}.get(row["unit_kind"])
    return f"{place}{letter}{row['unit']}" if letter else f"{row['unit_kind']} {row['unit']}"


def _title(frame: pd.DataFrame, described: int) -> str:
    kinds = " and ".join(_KINDS.get(kind, kind) for kind in dict.fromkeys(frame["unit_kind"]))
    parts = []
    for metric in ("detection", "fuzzing", "causal"):
        rows = frame[frame["metric"] == metric]
        if not len(rows):
            continue
        unit = " nats" if metric == "causal" else ""
        control = rows["control"].mean()
        beside = f" (another unit's description {control:.2f})" if np.isfinite(control) else ""
        parts.append(f"{metric} {rows['value'].mean():.2f}{unit}{beside}".replace("-", "−"))
    scored = ", mean " + ", ".join(parts) if parts else ", none of them scored"
    return f"{described} descriptions of {kinds}{scored}"


def _notes(frame: pd.DataFrame) -> tuple[str, ...]:
    missing = int((frame["metric"] == _NONE).sum())
    return (f"{missing} descriptions have no score.",) if missing else ()


class _Draw:
    """Scores of the units of highest detection (or what else was scored), with their controls."""

    def __init__(self, units: int) -> None:
        self.units = units

    def __call__(self, result: Result) -> go.Figure:
        frame = result.df()
        shares = frame[frame["metric"].isin(["detection", "fuzzing"])]
        scored = shares if len(shares) else frame[frame["metric"] == "causal"]
        figure = go.Figure()
        if not len(scored):
            figure.add_scatter(x=[], y=[])
            figure.add_annotation(text="no description has a score", showarrow=False)
            return figure
        scored = scored.assign(
            key=[f"{row['name']} · {row['describer']} · {row['description']}" for row in scored.to_dict("records")]
        )
        best = scored.groupby("key", sort=False)["value"].max().sort_values(ascending=False, kind="stable")
        chosen = list(best.index[: self.units])
        label = {key: plain(_short(key, scored)) for key in chosen}
        for number, (metric, part) in enumerate(scored[scored["key"].isin(chosen)].groupby("metric", sort=True)):
            color = SERIES[number]
            y = [label[key] for key in part["key"]]
            figure.add_scatter(
                x=part["value"], y=y, mode="markers", name=str(metric), marker={"color": color, "size": 9, "symbol": number},
                error_x={
                    "type": "data", "symmetric": False, "array": (part["ci_high"] - part["value"]).fillna(0),
                    "arrayminus": (part["value"] - part["ci_low"]).fillna(0), "thickness": 1,
                },
                hovertemplate="%{y}<br>" + str(metric) + " %{x:.3f}<extra></extra>",
            )  # fmt: skip
            if part["control"].notna().any():
                figure.add_scatter(
                    x=part["control"], y=y, mode="markers", name=f"{metric}, another unit's description",
                    marker={"color": color, "size": 9, "symbol": f"{('circle', 'square')[number % 2]}-open"},
                    hovertemplate="%{y}<br>another description: %{x:.3f}<extra></extra>",
                )  # fmt: skip
        chance = 0.5 if len(shares) else 0.0
        figure.add_vline(x=chance, line={"color": CHANCE, "dash": "dash"})
        figure.update_xaxes(
            title="balanced accuracy (dashed: chance)"
            if len(shares)
            else "log p lost by the named words (nats a token)",
            range=[-0.03, 1.03] if len(shares) else None,
        )
        figure.update_yaxes(
            type="category", autorange="reversed", categoryorder="array", categoryarray=list(label.values())
        )
        figure.update_layout(height=max(300, 190 + 26 * len(chosen)))
        return figure


def _short(key: str, scored: pd.DataFrame) -> str:
    row = scored[scored["key"] == key].iloc[0]
    text = row["description"]
    text = text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
    who = f" ({row['describer']})" if scored["describer"].nunique() > 1 else ""
    return f"{row['name']}{who}: {text}"
