"""Steering at several strengths: what it reaches, what it costs elsewhere, and what matched controls do."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pyarrow as pa

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.core.statistics import bootstrap_ratio
from moescope.routing.effects.against_controls import beyond_controls
from moescope.routing.features.steering_figure import draw
from moescope.store.run import Run

_NAME = re.compile(r"^(?P<what>.*) → (?P<target>.*) × (?P<strength>[-+.0-9e]+)$")
_TARGETS = {
    "delta_target_logprob": "nats",
    "delta_target_logit": "logits",
    "delta_target_activation": "units of activation",
    "delta_target_probability": "probability",
}
_COSTS = {
    "kl": ("KL", "nats"),
    "delta_nll": ("ΔNLL", "nats"),
    "flips": ("flips", "share of tokens"),
    "delta_repetition": ("Δrepetition", "share of 4-grams"),
    "delta_distinct_2": ("Δdistinct-2", "share"),
    "delta_length": ("Δlength", "tokens"),
}

_SWEEPS = """
    SELECT sweep_id::VARCHAR AS sweep_id, max(effect_id) AS latest
    FROM effects
    WHERE base_run_id = $run AND sweep_id IS NOT NULL AND metric LIKE 'delta_target_%'
    GROUP BY sweep_id
    ORDER BY latest DESC
"""
_NAMED = """
    SELECT DISTINCT effect_id::VARCHAR AS effect_id, intervention ->> '$.name' AS name
    FROM effects
    WHERE base_run_id = $run AND sweep_id::VARCHAR = $sweep AND kind = 'target'
    ORDER BY effect_id
"""
SUMS_SQL = """
    SELECT
        e.effect_id::VARCHAR AS effect_id,
        e.kind,
        e.draw,
        e.metric,
        s.document_id,
        s.label,
        sum(e.sum) AS total,
        sum(e.n)::DOUBLE AS n
    FROM effect_sequences e
    JOIN sequences s ON s.run_id = $run AND s.sequence_id = e.sequence_id
    WHERE e.effect_id IN (SELECT effect_id FROM effects WHERE base_run_id = $run AND sweep_id::VARCHAR = $sweep)
    GROUP BY ALL
    ORDER BY ALL
"""


@analysis(
    name="steering_dose",
    needs=("effects",),
    source="KL as side effect of steering: arXiv 2308.10248; steering by latents: arXiv 2501.11036, 2408.00657",
    section="features",
    order=80,
)
def steering_dose(
    run: Run, *, sweep: str | None = None, on: str | None = None, draws: Count = 1000, seed: Natural = 0
) -> Result:
    """What does steering reach at each strength, and what does it cost elsewhere, beside matched controls?

    The target's number (log-probability of tokens, a latent's activation, a probe's answer) and KL(unedited ‖ steered), ΔNLL
    and flips are means over predicted tokens, each less the unedited model's. Controls are the same edit of other latents,
    active about as often and writing vectors of the same length, or of random directions of the same norm, at the same
    strengths; `beyond controls` is the target's effect less their mean, on the same resampled documents and resampled
    controls. KL of the same size from a control that moves the target less is what a direction of its own buys.

    Args:
        sweep: id of the dose-response, or how it begins; the newest by default.
        on: label of the texts that the target is of: its effect is then taken on those, and every cost on all others.
        draws: bootstrap resamples of documents.
        seed: of the resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> from moescope.sae.steering.dose import dose_response
        >>> from moescope.sae.steering.targets import TokenTarget
        >>> model = ms.load("demo")
        >>> push = ms.Intervention([ms.edits.Add(layer=2, vector=[0.5] * model.anatomy.d_model)], name="push")
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     found = dose_response(model, push, ["Hello world."], store, target=TokenTarget(model, 5), strengths=[1],
        ...                           controls=1, progress=False)
        ...     steering_dose(found.base).df()["metric"].tolist()
        ['target effect', 'target effect beyond controls', 'KL', 'ΔNLL', 'flips']
    """
    sweep_id = _chosen(run, sweep)
    named = _named(run, sweep_id)
    sums = run.sql(SUMS_SQL, {"sweep": sweep_id}).df()
    target = next((metric for metric in _TARGETS if (sums["metric"] == metric).any()), "")
    if on is not None and on not in set(sums["label"].dropna()):
        raise InputError(
            f"the base run has no text of label {on!r}",
            expected=", ".join(sorted(set(sums["label"].dropna()))) or "labels",
        )
    frame = _points(named, sums, target, on, draws, seed)
    what, goal = named["what"].iloc[0], named["target"].iloc[0]
    notes = [f"Dose-response {sweep_id}."]
    if not frame["controls"].max():
        notes.append("There are no controls: nothing tells how large such an effect is at random.")
    where = "on all texts" if on is None else f"on texts of label {on!r}, costs on all others"
    return Result(
        title=_title(frame, what, goal, _TARGETS[target]),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=draw,
        n=int(frame.loc[frame["metric"] == "target effect", "n"].max()),
        n_unit="predicted tokens",
        definition=f"target effect: {goal}, less the unedited model's, mean over predicted tokens {where}. KL(unedited ‖ "
        "steered), ΔNLL and flips likewise; Δrepetition, Δdistinct-2 and Δlength of greedy continuations, mean over prompts.",
        units={f"value[{name}]": unit for name, unit in _COSTS.values()}
        | {"value[target effect]": _TARGETS[target], "value[target effect beyond controls]": _TARGETS[target]}
        | {"strength": "times the edits' own strength"},
        interval=f"95 % percentile bootstrap over documents, {draws} resamples; beyond controls, over controls too",
        null="mean of the matched controls at the same strength; without controls, the unedited model: 0",
        sql=SUMS_SQL,
        sql_parameters={"run": run.run_id, "sweep": sweep_id},
        computation="sums by document of effect_sequences, resampled",
        notes=tuple(notes),
    )


def _chosen(run: Run, sweep: str | None) -> str:
    there = [str(sweep_id) for sweep_id, _ in run.sql(_SWEEPS).fetchall()]
    chosen = [sweep_id for sweep_id in there if sweep is None or sweep_id.startswith(sweep)]
    if not chosen:
        raise InputError(
            f"there is no dose-response of steering against run {run.name!r}"
            + (f" with the id {sweep!r}" if sweep else ""),
            expected=", ".join(there) or None,
            fix="measure one: moescope sae steer, or ms.sae.dose_response(…)",
        )
    return chosen[0]


def _named(run: Run, sweep_id: str) -> pd.DataFrame:
    """A row a strength: effect_id, what steers, its target, strength."""
    rows = []
    for effect_id, name in run.sql(_NAMED, {"sweep": sweep_id}).fetchall():
        found = _NAME.match(name or "")
        if found is not None:
            rows.append({"effect_id": str(effect_id), **found.groupdict(), "strength": float(found["strength"])})
    return pd.DataFrame(rows, columns=["effect_id", "what", "target", "strength"]).sort_values("strength")


def _points(
    named: pd.DataFrame, sums: pd.DataFrame, target: str, on: str | None, draws: int, seed: int
) -> pd.DataFrame:
    rows = []
    own = sums if on is None else sums[sums["label"] == on]
    others = sums if on is None else sums[sums["label"] != on]
    for effect_id, strength in zip(named["effect_id"], named["strength"], strict=True):
        for metric, name in {target: "target effect", **{m: n for m, (n, _) in _COSTS.items()}}.items():
            part = own if metric == target else others
            part = part[(part["effect_id"] == effect_id) & (part["metric"] == metric)]
            rows += _numbers(part, name, draws, seed, beyond=metric == target, strength=strength)
    return pd.DataFrame(rows)


def _numbers(
    part: pd.DataFrame, name: str, draws: int, seed: int, *, beyond: bool, strength: float
) -> list[dict[str, object]]:
    """The rows of one metric at one strength."""
    mine = part[part["kind"] == "target"].groupby("document_id")[["total", "n"]].sum()
    if mine.empty or not mine["n"].sum():
        return []
    controls = part[part["kind"] == "control"]
    laid = {
        column: controls.pivot_table(index="draw", columns="document_id", values=column, aggfunc="sum")
        .reindex(columns=mine.index).fillna(0.0).to_numpy(np.float64)
        for column in ("total", "n")
    }  # fmt: skip
    totals, n = mine["total"].to_numpy(np.float64), mine["n"].to_numpy(np.float64)
    value, low, high = (float(x) for x in bootstrap_ratio(totals, n, draws=draws, seed=seed))
    means = laid["total"].sum(1) / np.maximum(laid["n"].sum(1), 1) if len(laid["total"]) else np.zeros(0)
    none = float("nan")
    base = {"strength": strength, "n": int(n.sum()), "controls": len(means)}
    found: list[dict[str, object]] = [
        {
            **base, "metric": name, "value": value, "ci_low": low, "ci_high": high,
            "null": float(means.mean()) if len(means) else 0.0,
            "control_low": float(means.min()) if len(means) else none,
            "control_high": float(means.max()) if len(means) else none,
        }
    ]  # fmt: skip
    if beyond and len(means):
        gap = beyond_controls(totals, laid["total"], n, laid["n"], draws=draws, seed=seed)
        found.append(
            {
                **base, "metric": f"{name} beyond controls", "value": gap.value, "ci_low": gap.ci_low, "ci_high": gap.ci_high,
                "null": 0.0, "control_low": none, "control_high": none, "rank_p": gap.rank_p,
            }
        )  # fmt: skip
    return found


def _title(frame: pd.DataFrame, what: str, goal: str, unit: str) -> str:
    effect = frame[frame["metric"] == "target effect"]
    most = effect.loc[effect["strength"].abs().idxmax()]
    text = (
        f"At {most['strength']:g} times its strength, steering by {what} changes {goal} by {most['value']:.3g} {unit}"
    )
    if np.isfinite(most["ci_low"]):
        text += f" ({most['ci_low']:.3g} to {most['ci_high']:.3g})"
    if most["controls"]:
        text += f", controls by {most['control_low']:.3g} to {most['control_high']:.3g}"
    kl = frame[(frame["metric"] == "KL") & (frame["strength"] == most["strength"])]
    return text if kl.empty else f"{text}, at a KL of {kl['value'].iloc[0]:.3g} nats"
