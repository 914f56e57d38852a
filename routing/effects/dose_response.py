"""An intervention at several strengths: what it does to predictions, and what it costs in coherence."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.figures import CHANCE, SERIES
from moescope.core.result import Result
from moescope.core.statistics import bootstrap_ratio
from moescope.routing.effects.sweep_records import EFFECTS_SQL, SweepRecords, read_sweep
from moescope.store.run import Run

_STRENGTH = re.compile(r"^(.*) × ([-+.0-9e]+)$")
_NAMES = {
    "delta_nll": ("ΔNLL", "nats"),
    "kl": ("KL", "nats"),
    "flips": ("flips", "share of tokens"),
    "delta_repetition": ("Δrepetition", "share of 4-grams"),
    "delta_distinct_1": ("Δdistinct-1", "share"),
    "delta_distinct_2": ("Δdistinct-2", "share"),
    "delta_distinct_3": ("Δdistinct-3", "share"),
    "delta_length": ("Δlength", "tokens"),
}


@analysis(
    name="dose_response",
    needs=("effects",),
    source="seq-rep-4: arXiv 1908.04319; distinct-n: arXiv 1510.03055; KL as side effect of steering: arXiv 2308.10248",
    section="effects",
    order=50,
)
def dose_response(run: Run, *, sweep: str | None = None, draws: Count = 1000, seed: Natural = 0) -> Result:
    """How does an effect grow with the strength of its intervention, and what does it cost in coherence?

    Strengths multiply those of the edits. KL(unedited ‖ edited) on the corpus is what the predictions move; repetition
    (1 − distinct-4 of greedy continuations) and distinct-n, each less the unedited model's, are what is left of writing.

    Args:
        sweep: id of the sweep, or how it begins; the newest of the kind by default.
        draws: bootstrap resamples of documents.
        seed: of the resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> from moescope.core.intervention import Intervention
        >>> from moescope.core.edit_kinds.experts import Ablate
        >>> from moescope.sweep_api import sweep
        >>> cut = Intervention([Ablate(layer=3, experts=[1, 2])], name="cut")
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     found = sweep(ms.load("demo"), ["Hello world."], store, kind="dose", intervention=cut, strengths=[0, 1],
        ...                   generate=0, progress=False)
        ...     float(found.df()["value"][0])
        0.0
    """
    records = read_sweep(run, "dose", sweep)
    frame = _points(records, draws, seed)
    called = str(frame["intervention"].iloc[0])
    return Result(
        title=_title(frame, called),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=int(records.frame["n"].max()),
        n_unit="predicted tokens",
        definition="ΔNLL, KL(unedited ‖ edited) and flips: means over predicted tokens. Δrepetition: share of 4-grams of a greedy "
        "continuation that occurred before in it, less that of the unedited model; Δdistinct-n and Δlength likewise; means over prompts.",
        units={f"value[{name}]": unit for name, unit in _NAMES.values()}
        | {"strength": "times the edits' own strength"},
        interval=f"95 % percentile bootstrap over documents, {draws} resamples",
        null="strength 0, the unedited model: 0",
        sql=EFFECTS_SQL,
        sql_parameters={"run": run.run_id, "sweep": records.sweep_id},
        computation="sums by document of effect_sequences, resampled",
        notes=(f"Sweep {records.sweep_id}.",),
    )


def _points(records: SweepRecords, draws: int, seed: int) -> pd.DataFrame:
    rows = []
    for metric, (name, _) in _NAMES.items():
        if not records.has(metric):
            continue
        totals, n = records.sums(metric)
        value, low, high = bootstrap_ratio(totals, n, draws=draws, seed=seed)
        for number, called in enumerate(records.frame["name"]):
            found = _STRENGTH.match(called)
            if found is None or not n[:, number].sum():
                continue
            rows.append(
                {
                    "intervention": found[1], "strength": float(found[2]), "metric": name, "value": value[number],
                    "ci_low": low[number], "ci_high": high[number], "null": 0.0, "n": int(n[:, number].sum()),
                }
            )  # fmt: skip
    return pd.DataFrame(rows).sort_values(["metric", "strength"], kind="stable", ignore_index=True)


def _title(frame: pd.DataFrame, called: str) -> str:
    effect = frame[frame["metric"] == "ΔNLL"]
    most = effect.loc[effect["strength"].abs().idxmax()]
    text = f"At {most['strength']:g} times its strength, {called} changes the NLL by {most['value']:.3g} nats"
    if not np.isnan(most["ci_low"]):
        text += f" ({most['ci_low']:.3g} to {most['ci_high']:.3g})"
    same = frame[frame["strength"] == most["strength"]].set_index("metric")["value"]
    text += f" at a KL of {same['KL']:.3g} nats"
    return text if "Δrepetition" not in same else f"{text}, and repetition by {100 * same['Δrepetition']:+.1f} points"


def _draw(result: Result) -> go.Figure:
    from plotly.subplots import make_subplots

    frame = result.df()
    writes = "Δrepetition" in set(frame["metric"])
    shown = [("ΔNLL", "ΔNLL (nats per token)"), ("KL", "KL (nats per token)")]
    shown += [("Δrepetition", "Δrepetition (share of 4-grams)")] if writes else []
    figure = make_subplots(rows=1, cols=len(shown), horizontal_spacing=0.12)
    for number, (metric, unit) in enumerate(shown):
        part = frame[frame["metric"] == metric]
        if not (part["strength"] == 0).any():
            part = pd.concat([pd.DataFrame({"strength": [0.0], "value": [0.0]}), part])
        part = part.sort_values("strength")
        figure.add_trace(
            go.Scatter(
                x=part["strength"], y=part["value"], mode="lines+markers", line={"color": SERIES[number]}, showlegend=False,
                error_y={
                    "type": "data", "symmetric": False, "array": part["ci_high"] - part["value"],
                    "arrayminus": part["value"] - part["ci_low"], "thickness": 1,
                },
                hovertemplate=f"{metric} at × %{{x}}: %{{y:.4g}}<extra></extra>",
            ),
            row=1, col=number + 1,
        )  # fmt: skip
        figure.add_hline(y=0, line={"color": CHANCE, "dash": "dash"}, row=1, col=number + 1)
        figure.update_xaxes(title="strength (× the edits' own)", row=1, col=number + 1)
        figure.update_yaxes(title=unit, row=1, col=number + 1)
    figure.update_layout(height=380)
    return figure
