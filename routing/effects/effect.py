"""One intervention: what it does to predictions, beside its matched controls."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import pyarrow as pa

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.result import Result
from moescope.routing.effects.against_controls import Difference, control_means, differences
from moescope.routing.effects.effect_figure import draw_effect
from moescope.routing.effects.metric_names import decimals, in_order, minus, with_interval
from moescope.routing.effects.stored_effects import ROWS_SQL, StoredEffect, stored_effect
from moescope.store.run import Run

INTERVAL = "95 % percentile bootstrap over documents, 1,000 resamples"
NULL = (
    "mean of its random controls: the same edit of as many others, or of a random direction of the same norm. Of one effect: in the "
    "same layers (Skip: in others) and, for experts, of the nearest loads; random sets of sweeps are not matched by load, and heads "
    "masked on needle trials only where layers were matched"
)
DEFINITION = (
    "Over predicted tokens, edited model against the unedited one on the same tokens. delta_nll: NLL under the edit less NLL "
    "without; kl: KL(unedited ‖ edited) of the distribution over each token; flips: share of tokens whose most likely "
    "prediction is another. content_…: the same while every router replays the decisions of the unedited model; rerouting_…: "
    "the rest of the whole. delta_repetition, delta_distinct_n, delta_length: of greedy continuations, by text; "
    "repetition is the share of 4-grams that occurred before (seq-rep-4), distinct-n that of n-grams that differ."
)


@analysis(
    name="effect",
    needs=("effects",),
    source="paired bootstrap over documents (Efron & Tibshirani 1993); random controls as in arXiv 2507.23279 §4; seq-rep-4: "
    "arXiv 1908.04319; distinct-n: arXiv 1510.03055",
    section="effects",
    order=10,
)
def effect(run: Run, *, effect: str = "latest", draws: Count = 1000, seed: Natural = 0) -> Result:
    """What does an intervention do to the model's predictions, beyond what random ones of its size do?

    ΔNLL is the mean over predicted tokens of NLL under the edit less NLL without it, on the same tokens; KL is that of
    KL(unedited ‖ edited); flips the share of tokens whose most likely prediction is another. Each is told for the
    intervention, for each matched random control, and as the difference of the first from the mean of the second, whose
    interval resamples documents for all of them jointly and the controls with them. That difference says how far this
    intervention is from the average random one; `rank_p`, the share of controls (the intervention counted among them) with at
    least its magnitude, says how rare it is, and cannot be smaller than 1 ÷ (controls + 1).

    A KL is never below 0, so that its interval excludes 0 for any edit that does anything at all: only the controls tell
    whether it is large.

    Args:
        effect: its id, or the beginning of it; `latest` for the one measured last.
        draws: bootstrap resamples for the difference from the controls.
        seed: of that resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> from moescope.core.edit_kinds.experts import Ablate
        >>> from moescope.core.intervention import Intervention
        >>> from moescope.probes.effects.measure import measure_effect
        >>> cut = Intervention([Ablate(layer=3, experts=5)])
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     base = measure_effect(ms.load("demo"), ["Hello world."], cut, store, controls=2, progress=False).base
        ...     ms.analyze(base, "effect").df()["kind"].unique().tolist()
        ['target', 'control', 'difference']
    """
    found = stored_effect(run, effect)
    rows = found.of("all")
    beyond = differences(run, found.effect_id, draws=draws, seed=seed)
    frame = _frame(rows, beyond)
    whole = rows[(rows["kind"] == "target") & (rows["metric"] == "delta_nll")]
    n = int((whole if len(whole) else rows)["n"].max())
    return Result(
        title=title_of(found),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=draw_effect,
        n=n,
        n_unit="predicted tokens",
        definition=DEFINITION
        + " difference: the intervention less the mean of its controls; rank_p: share of controls, the "
        "intervention among them, of at least its magnitude; between: standard deviation between the controls.",
        units={f"value[{metric}]": unit for metric, unit in _units(rows).items()}
        | {"n": "tokens; for what is written, texts"},
        interval=f"{INTERVAL}; of differences: over documents and controls, {draws:,} resamples",
        null=NULL if found.controls else "none: there are no controls",
        sql=ROWS_SQL,
        sql_parameters={"run": run.run_id, "effect": found.effect_id},
        computation="differences from the controls, resampled from the sums by sequence in effect_sequences",
        notes=_notes(found),
    )


def title_of(found: StoredEffect) -> str:
    """The finding: how much NLL changes, with its interval, and what the controls do."""
    rows = found.of("all")
    targets = rows[rows["kind"] == "target"].set_index("metric")
    metric = "delta_nll" if "delta_nll" in targets.index else str(targets.index[0])
    row = targets.loc[metric]
    value, low, high, unit = float(row["value"]), float(row["ci_low"]), float(row["ci_high"]), str(row["unit"])
    what = "NLL" if metric == "delta_nll" else metric
    if np.isfinite(low) and low <= 0 <= high and not value == low == high == 0:
        said = f"{found.words} does not surely change {what}: {with_interval(value, low, high, sign=True)} {unit}"
    elif value == 0:
        said = f"{found.words} changes {what} by exactly 0 {unit}"
    else:
        # The size is told without its sign, and the interval turned with it.
        ends = (low, high) if value > 0 else (-high, -low)
        amount = with_interval(abs(value), *ends)
        number, _, rest = amount.partition(" (")
        said = f"{found.words} {'raises' if value > 0 else 'lowers'} {what} by {number} {unit}" + (
            f" ({rest}" if rest else ""
        )
    return f"{said}; {_controls_in_words(rows, metric, high - low)}"


def _controls_in_words(rows: pd.DataFrame, metric: str, width: float) -> str:
    controls = rows[(rows["kind"] == "control") & (rows["metric"] == metric)]["value"]
    if controls.empty:
        return "no matched controls"
    spread = float(controls.max() - controls.min())
    scale = min(x for x in (width, spread) if x > 0) if max(width, spread) > 0 else 0.0
    places = decimals(scale if np.isfinite(scale) else spread)
    named = f"{len(controls)} matched control{'s' * (len(controls) > 1)}"
    low, high = (minus(f"{x:.{places}f}") for x in (controls.min(), controls.max()))
    return f"{named} {low} to {high}" if low != high else f"{named} {low}"


def _frame(rows: pd.DataFrame, beyond: Mapping[str, Difference]) -> pd.DataFrame:
    """Rows of the intervention, its controls and the difference, metric by metric."""
    shown = rows.merge(control_means(rows, ["metric"])[["metric", "null"]], on="metric", how="left")
    shown["null"] = shown["null"].where(shown["kind"] == "target")
    parts = []
    for metric in in_order(shown["metric"]):
        part = shown[shown["metric"] == metric]
        parts.append(part[["metric", "kind", "draw", "value", "ci_low", "ci_high", "null", "n", "unit"]])
        if (difference := beyond.get(metric)) is not None:
            row = vars(difference)
            first = part.iloc[0]
            parts.append(
                pd.DataFrame(
                    [
                        {"metric": metric, "kind": "difference", **row, "n": first["n"], "unit": first["unit"]},
                    ]
                )
            )
    frame = pd.concat(parts, ignore_index=True)
    frame["draw"] = frame["draw"].astype("Int64")
    frame["n"] = frame["n"].astype("Int64")
    columns = [
        "metric",
        "kind",
        "draw",
        "value",
        "ci_low",
        "ci_high",
        "null",
        "rank_p",
        "between",
        "controls",
        "n",
        "unit",
    ]
    frame = frame.reindex(columns=columns)
    frame["controls"] = frame["controls"].astype("Int64")
    for name in ("value", "ci_low", "ci_high", "null", "rank_p", "between"):
        frame[name] = frame[name].astype(float)
    return frame


def _units(rows: pd.DataFrame) -> dict[str, str]:
    return dict(zip(rows["metric"], rows["unit"], strict=True))


def _notes(found: StoredEffect) -> tuple[str, ...]:
    notes = [f"Effect {found.effect_id}."]
    if not found.controls:
        notes.append("There are no controls: nothing tells how large such an effect is at random.")
    elif found.controls < 5:
        notes.append(f"Only {found.controls} control{'s' * (found.controls > 1)}: a rank says little.")
    return tuple(notes)
