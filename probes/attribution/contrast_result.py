"""The answer of a contrast: what suppressing and stimulating the chosen experts did to either set, beside random experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.figures import CHANCE, SERIES, plain
from moescope.core.intervention import Intervention
from moescope.core.result import Result
from moescope.probes.attribution.contrast_estimates import BOTH, PREFERENCE, Estimate
from moescope.probes.attribution.contrast_prompts import Halves
from moescope.store.run import Run

UNITS = {"delta_nll": "nats a token", "kl": "nats a token", "flips": "share of tokens", PREFERENCE: "nats"}


@dataclass(frozen=True)
class Tested:
    """An intervention and its controls, measured.

    Attributes:
        intervention: what was tested, with its name.
        controls: the random sets of experts.
        estimates: of the intervention, then of each control.
    """

    intervention: Intervention
    controls: tuple[Intervention, ...]
    estimates: tuple[tuple[Estimate, ...], ...]


def tested_table(tested: Sequence[Tested], labels: tuple[str, str]) -> pd.DataFrame:
    """One row an intervention or control, set and metric; targets carry mean and range of their controls.

    Args:
        tested: what was measured.
        labels: names of the sets.
    """
    rows = []
    names = {"a": labels[0], "b": labels[1], BOTH: f"{labels[0]} − {labels[1]}"}
    for one in tested:
        controls = one.estimates[1:]
        for number, estimates in enumerate(one.estimates):
            for place, estimate in enumerate(estimates):
                others = [control[place].value for control in controls] if number == 0 else []
                rows.append(
                    {
                        "intervention": one.intervention.name,
                        "kind": "target" if number == 0 else "control",
                        "draw": None if number == 0 else number - 1,
                        "set": estimate.side,
                        "label": names[estimate.side],
                        "metric": estimate.metric,
                        "value": estimate.value,
                        "ci_low": estimate.low,
                        "ci_high": estimate.high,
                        "null": sum(others) / len(others) if others else None,
                        "null_low": min(others) if others else None,
                        "null_high": max(others) if others else None,
                        "n": estimate.n,
                    }
                )
    numbers = ("draw", "null", "null_low", "null_high")
    return pd.DataFrame(rows).astype({name: "Int64" if name == "draw" else "float64" for name in numbers})


def finding(frame: pd.DataFrame, labels: tuple[str, str]) -> str:
    """The finding as a sentence: of the first intervention, what it costs one set more than the other, beside random experts."""
    first = frame["intervention"].iloc[0]
    metric = PREFERENCE if (frame["metric"] == PREFERENCE).any() else "delta_nll"
    targets = frame[(frame["kind"] == "target") & (frame["intervention"] == first) & (frame["metric"] == metric)]
    both = targets[targets["set"] == BOTH].iloc[0]
    by_set = targets.set_index("set")["value"]
    inside = both["null_low"] <= both["value"] <= both["null_high"]
    unsure = not (both["ci_low"] > 0 or both["ci_high"] < 0)
    verdict = "; not told from random experts" if inside else "; not told from 0" if unsure else ""
    interval = "" if pd.isna(both["ci_low"]) else f" [{_signed(both['ci_low'])}, {_signed(both['ci_high'])}]"
    beside = "no random experts to compare with"
    if not pd.isna(both["null"]):
        beside = (
            f"random experts: {_signed(both['null'])} ({_signed(both['null_low'])} to {_signed(both['null_high'])})"
        )
    return (
        f"{str(first).capitalize()}: {'moves the preference' if metric == PREFERENCE else 'changes the NLL'} by "
        f"{_signed(by_set['a'])} nats on {labels[0]} and {_signed(by_set['b'])} on {labels[1]}, a difference of "
        f"{_signed(both['value'])}{interval}; {beside}{verdict}"
    )


def _signed(number: float) -> str:
    return f"{number:+.3f}".replace("-", "−")


def tested_figure(result: Result) -> go.Figure:
    """One panel a metric, ΔNLL first: both sets and their difference under each intervention, controls as grey points."""
    from plotly.subplots import make_subplots

    frame = result.df()
    metrics = [m for m in (PREFERENCE, "delta_nll") if (frame["metric"] == m).any()]
    titles = {"delta_nll": "ΔNLL", PREFERENCE: "preference"}
    figure = make_subplots(
        rows=1, cols=len(metrics), subplot_titles=[titles[m] for m in metrics] if len(metrics) > 1 else None,
        horizontal_spacing=0.12,
    )  # fmt: skip
    for column, metric in enumerate(metrics, start=1):
        _panel(figure, frame[frame["metric"] == metric], metric, column)
    figure.update_layout(height=430)
    return figure


def _panel(figure: go.Figure, frame: pd.DataFrame, metric: str, column: int) -> None:
    interventions = list(dict.fromkeys(frame["intervention"]))
    order = list(dict.fromkeys(frame["label"]))
    controls = frame[frame["kind"] == "control"]
    for number, name in enumerate(interventions):
        target = frame[(frame["kind"] == "target") & (frame["intervention"] == name)]
        shift = 0.24 * (number - (len(interventions) - 1) / 2)
        mine = controls[controls["intervention"] == name]
        figure.add_scatter(
            x=[order.index(label) + shift for label in mine["label"]],
            y=mine["value"],
            mode="markers",
            name="random experts",
            legendgroup="random experts",
            showlegend=number == 0 and column == 1,
            marker={"color": CHANCE, "symbol": "line-ew-open", "size": 12},
            hovertemplate=f"{plain(str(name))}, random experts: %{{y:+.4f}}<extra></extra>",
            row=1,
            col=column,
        )
        figure.add_scatter(
            x=[order.index(label) + shift for label in target["label"]],
            y=target["value"],
            mode="markers",
            name=plain(str(name)),
            legendgroup=str(number),
            showlegend=column == 1,
            marker={"color": SERIES[number], "size": 10},
            error_y={
                "type": "data",
                "symmetric": False,
                "array": target["ci_high"] - target["value"],
                "arrayminus": target["value"] - target["ci_low"],
            },
            customdata=target[["ci_low", "ci_high"]],
            hovertemplate=f"{plain(str(name))}: %{{y:+.4f}} [%{{customdata[0]:+.4f}}, %{{customdata[1]:+.4f}}]<extra></extra>",
            row=1,
            col=column,
        )
    figure.add_hline(y=0, line={"color": CHANCE, "width": 1}, row=1, col=column)
    figure.update_xaxes(tickvals=list(range(len(order))), ticktext=[plain(label) for label in order], row=1, col=column)
    what = "change of NLL" if metric == "delta_nll" else "change of preference"
    figure.update_yaxes(title=f"{what}, {UNITS[metric]}", row=1, col=column)


def contrast_result(
    tested: Sequence[Tested],
    halves: Halves,
    runs: tuple[Run, Run],
    found: Result,
    notes: tuple[str, ...],
    *,
    draws: int,
    parameters: Mapping[str, Any],
) -> Result:
    """The answer as a `Result`.

    Args:
        tested: what was measured.
        halves: the prompts.
        runs: of the prompts that chose, and of those tested.
        found: the analysis that ranked the experts.
        notes: what a reader must know.
        draws: bootstrap resamples.
        parameters: of the contrast, `method` among them.
    """
    frame = tested_table(tested, halves.labels)
    count = min(len(one.controls) for one in tested)
    a, b = halves.labels
    sizes = {label: sum(d.label == label for d in halves.tested_on) for label in halves.labels}
    others = sum(1 for _ in halves.chosen_on)
    metrics = {f"value[{metric}]": UNITS[metric] for metric in dict.fromkeys(frame["metric"])}
    return Result(
        title=finding(frame, halves.labels),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=tested_figure,
        n=sum(sizes.values()),
        n_unit=f"prompts tested ({sizes[a]:,} of {a}, {sizes[b]:,} of {b}); experts chosen on {others:,} others",
        definition=f"Experts ranked by {str(parameters['method']).replace('_', ' ')} on one half of the prompts. On the other "
        "half, the edited less the unedited model: delta_nll (mean over predicted tokens), kl and flips; preference is mean "
        "log p(desired | prompt) less mean log p(undesired | prompt).",
        units=metrics | {"n": "tokens; prompts for preference"},
        interval=f"95 % percentile bootstrap over prompts, each set by itself, {draws} resamples; chosen experts held fixed",
        null=f"random sets of as many experts of the same routers and like load, {count} for each intervention: their mean, and "
        "their range in null_low and null_high",
        computation="paired passes over the same tokens without edits, under the edits, and under each control",
        notes=(f"Where experts were chosen: {found.title}.", *notes),
        name="contrast",
        source=found.source,
        parameters=dict(parameters),
        provenance=dict(runs[1].provenance),
        incomplete=not all(run.complete for run in runs),
    )
