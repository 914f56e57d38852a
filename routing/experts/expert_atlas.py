"""The atlas: every expert of a model by any one measure."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa

from moescope.core.analysis import analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.routing.experts.atlas_figure import draw
from moescope.routing.experts.measures import Measure, measure_named
from moescope.routing.experts.places import WORDS, Sort, gini, placed
from moescope.routing.experts.readings import KEY, Reading
from moescope.routing.grid import layer_name
from moescope.store.run import Run

_CELLS = """
    SELECT l.layer, l.block, e.expert::INTEGER AS expert, sum(d.tokens)::BIGINT AS tokens
    FROM layers l
    CROSS JOIN LATERAL (SELECT unnest(range(l.n_experts + coalesce(l.n_null, 0))) AS expert) e
    LEFT JOIN loads d ON d.run_id = l.run_id AND d.layer = l.layer AND d.block = l.block AND d.expert = e.expert
    WHERE l.run_id = $run AND l.n_experts IS NOT NULL
    GROUP BY l.layer, l.block, e.expert
    ORDER BY l.layer, l.block, e.expert
"""
_ANY = "SELECT 1 FROM layers WHERE run_id = $run AND n_experts IS NOT NULL LIMIT 1"
VALUE, DEAD = "value", "never chosen"
GINI, SPREAD, PROFILE = "Gini coefficient of the layer", "standard deviation of the layer", "mean over layers"


@analysis(
    name="expert_atlas",
    source="each measure as in the analysis it names; layer × expert maps as in arXiv 2409.02060 §5",
    section="experts",
    order=5,
)
def expert_atlas(
    run: Run,
    *,
    measure: str = "load",
    sort: Sort = "index",
    label: str | None = None,
    other: str | None = None,
) -> Result:
    """How do all experts of the model compare by one measure?

    One value for every expert of every router, read as the analysis of that measure reads it. Beside each layer its Gini
    coefficient (standard deviation where the measure has a sign), above each place the mean over layers. Experts that were
    never chosen have no value and are told apart from those whose value was not recorded.

    Args:
        measure: what the experts are compared by; a wrong name is answered with all of them.
        sort: the order of each layer's experts: by number, by load, or by likeness of use, so that experts that the same
            documents use stand side by side.
        label: for the measure label_lift, the label whose lift is shown; the one each expert prefers by default.
        other: name of another run in the store; the value is then this run's less that one's.

    Raises:
        InputError: no such measure, label or run, or the run has not what the measure is read from.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world."], store, name="first", progress=False)
        ...     frame = ms.analyze(run, "expert_atlas", measure="weight", sort="load").df()
        >>> sorted(frame["metric"].unique())
        ['Gini coefficient of the layer', 'Mean weight', 'mean over layers']
    """
    chosen = measure_named(measure)
    if not run.sql(_ANY).fetchall():
        raise InputError(
            f"run {run.name!r} has no experts",
            found="a dense model: no layer has a router",
            fix="choose a run of a mixture of experts",
        )
    reading = chosen.read(run, label)
    frame = _valued(run, reading)
    if other is not None:
        frame = _less(frame, _valued(run.store.run(other), chosen.read(run.store.run(other), label)))
    frame["place"] = placed(run, frame, sort)
    signed = chosen.centred or other is not None
    frame = frame.assign(metric=chosen.title, sort=sort)
    summary = _by_layer(frame, signed)
    table = pd.concat([frame, summary, _by_place(frame)], ignore_index=True)
    return Result(
        title=_title(chosen, frame, summary, other),
        table=_table(table, reading, other),
        draw=lambda result: draw(result, chosen, signed=signed),
        n=reading.n,
        n_unit=reading.n_unit,
        definition=f"{chosen.definition} Unit: {chosen.unit}."
        + (f" Shown is the value of this run less that of the run {other}." if other else "")
        + f" Experts stand {WORDS[sort]}. Right of each layer: "
        + ("standard deviation over its experts" if signed else "Gini coefficient over its experts")
        + "; above: mean over layers of the experts at that place. Limits of the colours: 2nd and 98th percentile; "
        "cells beyond them are marked.",
        units={f"value[{chosen.title}]": chosen.unit, "n": reading.n_unit, "place": "from 0", "tokens": "decisions"},
        interval=None if other else reading.interval,
        null=None if other else reading.null,
        sql=reading.sql,
        sql_parameters=reading.parameters,
        computation=", ".join(
            part for part in (reading.computation, "one value an expert, placed in its layer") if part
        ),
        notes=reading.notes,
    )


def _valued(run: Run, reading: Reading) -> pd.DataFrame:
    """Every expert of the model with its value, or why it has none."""
    cells = run.sql(_CELLS).df()
    columns = [c for c in ("value", "ci_low", "ci_high", "null", "n", "amount", "detail") if c in reading.frame]
    values = reading.frame.drop_duplicates(KEY).astype({"layer": int, "expert": int})
    frame = cells.merge(values[[*KEY, *columns]], on=KEY, how="left")
    for name in ("value", "ci_low", "ci_high", "null", "n", "amount"):
        frame[name] = frame[name].astype(float) if name in frame else np.nan
    frame["amount"] = frame["amount"].where(frame["amount"].notna(), frame["value"])
    frame["detail"] = frame["detail"].where(frame["detail"].notna(), "") if "detail" in frame else ""
    known = np.isfinite(frame["value"].to_numpy(np.float64))
    dead = frame["tokens"].eq(0).fillna(False).to_numpy(bool)
    frame["value"] = frame["value"].where(known)
    absent = frame["detail"].where(frame["detail"] != "", reading.absent)
    frame["state"] = np.where(known, VALUE, np.where(dead, DEAD, absent))
    return frame


def _less(frame: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """The value less that of another run; not recorded where either has none."""
    both = frame.merge(other[[*KEY, "value", "state"]], on=KEY, how="left", suffixes=("", "_other"))
    if not both["state_other"].notna().any():
        raise InputError(
            "the two runs have no expert in common", fix="compare runs of one model, or of models of one shape"
        )
    frame = frame.assign(value=both["value"] - both["value_other"], detail="")
    frame["amount"], frame["null"], frame["ci_low"], frame["ci_high"] = frame["value"], np.nan, np.nan, np.nan
    gone = frame["value"].isna() & (frame["state"] == VALUE)
    theirs = both["state_other"].fillna("no such expert")
    frame["state"] = np.where(gone, theirs + " in the other run", frame["state"])
    return frame


def _by_layer(frame: pd.DataFrame, signed: bool) -> pd.DataFrame:
    """One row a router: how unequal its experts are."""
    rows = []
    for (layer, block), part in frame.groupby(["layer", "block"]):
        values = part["value"].to_numpy(np.float64)
        known = values[np.isfinite(values)]
        spread = float(np.std(known)) if len(known) else np.nan
        value = spread if signed else gini(part["amount"].to_numpy(np.float64))
        rows.append(
            {"layer": layer, "block": block, "metric": SPREAD if signed else GINI, "value": value, "n": len(known)}
        )
    return pd.DataFrame(rows)


def _by_place(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a place: the mean over layers."""
    mean = frame.groupby("place")["value"].agg(["mean", "count"]).reset_index()
    return pd.DataFrame({"place": mean["place"], "metric": PROFILE, "value": mean["mean"], "n": mean["count"]})


def _table(frame: pd.DataFrame, reading: Reading, other: str | None) -> pa.Table:
    columns = ["layer", "block", "expert", "metric", "value", "n", "tokens", "place", "state", "detail", "sort"]
    if reading.interval and not other:
        columns[5:5] = ["ci_low", "ci_high"]
    if reading.null and not other:
        columns[5:5] = ["null"]
    for name in ("layer", "expert", "place", "tokens"):
        frame[name] = frame[name].astype("Int64")
    if (frame["n"].dropna() % 1 == 0).all():
        frame["n"] = frame["n"].astype("Int64")
    return pa.Table.from_pandas(frame[columns], preserve_index=False)


def _title(measure: Measure, frame: pd.DataFrame, summary: pd.DataFrame, other: str | None) -> str:
    known = frame[frame["state"] == VALUE]
    if known.empty:
        return f"{measure.title}: no expert has a value"
    signed = measure.centred or other is not None
    if other is not None and not known["value"].any():
        return f"{measure.title}: no expert differs from run {other}"
    best = known.loc[known["value"].abs().idxmax() if other else known["value"].idxmax()]
    name = f"{layer_name(best['layer'], best['block'])}·E{best['expert']}"
    value = measure.said(best["value"], difference=other is not None)
    about = f" ({best['detail']})" if best["detail"] else ""
    if other:
        head = f"{measure.title}: {name} differs most from run {other}, by {value}"
    else:
        head = f"{measure.title}: {name} stands highest, at {value}{about}"
    uneven = summary[summary["value"].notna()]
    if len(uneven) > 1:
        widest = uneven.loc[uneven["value"].idxmax()]
        kind = "standard deviation" if signed else "Gini"
        place = layer_name(int(widest["layer"]), str(widest["block"]))
        head += f"; layers differ most inside in {place} ({kind} {widest['value']:.3g})"
    dead = int((frame["state"] == DEAD).sum())
    rest = frame["state"][~frame["state"].isin([VALUE, DEAD])].value_counts()
    head += f"; {dead:,} of {len(frame):,} experts {'is' if dead == 1 else 'are'} never chosen" if dead else ""
    return head + "".join(f"; {count:,} {state}" for state, count in rest.items())
