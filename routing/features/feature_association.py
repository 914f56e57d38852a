"""Association of concepts: whether the latents of two concepts fire in the same windows of text."""

from __future__ import annotations

import json
from typing import Literal

import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import analysis
from moescope.core.errors import InputError
from moescope.core.figures import CHANCE, SERIES, plain
from moescope.core.result import Result
from moescope.routing.features.feature_tables import chosen_sae, reading_notes
from moescope.store.run import Run

Between = Literal["all", "labels", "concepts"]

_SQL = """
    SELECT s.group_kind AS "between", s.group_value, s.metric, s.value, s.ci_low, s.ci_high, n.value AS "null", n.ci_low AS null_low,
        n.ci_high AS null_high, s.n
    FROM sae_measures s
    JOIN sae_measures n ON n.run_id = s.run_id AND n.sae_id = s.sae_id AND n.metric = s.metric AND n.group_kind = s.group_kind
        AND n.group_value = s.group_value AND n.condition = 'shuffled'
    WHERE s.run_id = $run AND s.sae_id = $sae AND s.metric = 'association' AND s.condition = 'sae'
        AND ($between = 'all' OR s.group_kind = $between)
    ORDER BY abs(s.value - n.value) DESC, s.group_value
"""
_SHOWN = 24


@analysis(
    name="feature_association",
    needs=("sae_measures",),
    source="GPT and Prejudice: A Sparse Approach to Understanding Learned Representations in Large Language Models (association of concept "
    "families as log-odds of co-activation); correction of ½ after Haldane and Anscombe",
    section="features",
    order=42,
)
def feature_association(run: Run, *, sae: str | None = None, between: Between = "all") -> Result:
    """Do the latents of two concepts fire in the same windows of text?

    A concept is a set of latents: the ten of largest lift of a label (found at a false-discovery rate of 5 %, and of that label
    alone), or a set of the user's. A window of text counts for it where any of them is over 0 on any token. `value` is
    ln[(n11 + ½)(n00 + ½) ÷ (n10 + ½)(n01 + ½)] over the windows: over 0 where the concepts come together, under 0 where they
    keep apart. Below chance is what concepts of different documents are by themselves: read it against the null.

    Args:
        sae: name of the autoencoder; the newest of the run where not given.
        between: `labels`, `concepts` of the user, or both.

    Raises:
        InputError: no such autoencoder, or no association was measured.

    Example:
        >>> import moescope as ms
        >>> ms.analyze(run, "feature_association").df()  # doctest: +SKIP
    """
    chosen = chosen_sae(run, sae, table="sae_measures", having="metric = 'association'")
    given = {"sae": chosen.sae_id, "between": between}
    frame = run.sql(_SQL, given).df()
    if frame.empty:
        raise InputError(
            f"no association of concepts was measured with {chosen.name} on run {run.name!r}",
            fix="read features of a run whose documents have labels that latents go with, or name sets of latents: associate_features",
        )
    sets = [json.loads(text) for text in frame.pop("group_value")]
    for side in ("a", "b"):
        frame.insert(0 if side == "a" else 2, side, [s[side] for s in sets])
        frame.insert(
            1 if side == "a" else 3, f"latents_{side}", [" ".join(map(str, s[f"latents_{side}"])) for s in sets]
        )
    outside = int(((frame["value"] < frame["null_low"]) | (frame["value"] > frame["null_high"])).sum())
    return Result(
        title=_title(frame, outside),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=int(frame["n"].max()),
        n_unit="windows of text",
        definition="ln of the odds ratio of two sets of latents firing in the same window, ½ added to each count.",
        units={
            "value": "log odds (nats)",
            "null": "log odds (nats)",
            "null_low": "log odds (nats)",
            "null_high": "log odds (nats)",
            "n": "windows",
        },
        interval="95 % percentile bootstrap over documents, the sets held fixed",
        null="the second set's windows moved along the corpus by random numbers; mean, and 95 % of 200 "
        "moves in null_low and null_high",
        sql=_SQL,
        sql_parameters={"run": run.run_id, **given},
        notes=reading_notes(run, chosen) if run.rows("features") else (),
        computation="sets of latents read from the names of the groups",
    )


def _title(frame: pd.DataFrame, outside: int) -> str:
    first = frame.iloc[0]
    how = "come together" if first["value"] > first["null"] else "keep apart"
    return (
        f"{first['a']} and {first['b']} {how} the most: log odds {first['value']:+.2f}, by chance {first['null_low']:+.2f} to "
        f"{first['null_high']:+.2f}; {outside:,} of {len(frame):,} pairs are outside of chance"
    )


def _draw(result: Result) -> go.Figure:
    """Every pair with its interval, beside 95 % of what moved windows give."""
    frame = result.df().head(_SHOWN).iloc[::-1]
    names = [plain(f"{str(a)[:20]} × {str(b)[:20]}") for a, b in zip(frame["a"], frame["b"], strict=True)]
    figure = go.Figure()
    figure.add_scatter(
        x=frame["null"], y=names, mode="markers", name="95 % by chance", hoverinfo="skip",
        marker={"symbol": "line-ew", "size": 14, "line": {"width": 7, "color": "rgba(134, 142, 150, 0.5)"}},
        error_x={
            "type": "data", "symmetric": False, "array": frame["null_high"] - frame["null"], "thickness": 8, "width": 0,
            "arrayminus": frame["null"] - frame["null_low"], "color": "rgba(134, 142, 150, 0.35)",
        },
    )  # fmt: skip
    value = frame["value"].astype(float)
    figure.add_scatter(
        x=value, y=names, mode="markers", name="association", marker={"color": SERIES[0], "size": 8},
        error_x={
            "type": "data", "symmetric": False, "thickness": 1, "array": frame["ci_high"].fillna(value) - value,
            "arrayminus": value - frame["ci_low"].fillna(value),
        },
        hovertemplate="%{y}: %{x:+.2f}<extra></extra>",
    )  # fmt: skip
    figure.add_vline(x=0, line={"color": CHANCE, "width": 1})
    figure.update_xaxes(title="log odds of firing in the same window (nats)")
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=names)
    figure.update_layout(height=200 + 22 * len(names))
    return figure
