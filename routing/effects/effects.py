"""Every intervention that was measured against a run, ranked."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa

from moescope.core.analysis import analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.routing.effects.effect import DEFINITION, INTERVAL, NULL
from moescope.routing.effects.effect_figure import draw_ranking
from moescope.routing.effects.metric_names import metric_name, with_interval
from moescope.routing.effects.stored_effects import subject
from moescope.store.run import Run

_SQL = """
    SELECT
        effect_id::VARCHAR AS effect_id,
        max(sweep_id::VARCHAR) AS sweep_id,
        max(intervention::VARCHAR) FILTER (kind = 'target') AS intervention,
        metric,
        max(value) FILTER (kind = 'target') AS value,
        max(ci_low) FILTER (kind = 'target') AS ci_low,
        max(ci_high) FILTER (kind = 'target') AS ci_high,
        avg(value) FILTER (kind = 'control') AS "null",
        min(value) FILTER (kind = 'control') AS control_low,
        max(value) FILTER (kind = 'control') AS control_high,
        count(*) FILTER (kind = 'control') AS controls,
        max(n) FILTER (kind = 'target') AS n,
        max(unit) AS unit
    FROM effects
    WHERE base_run_id = $run AND group_kind = 'all' AND metric = $metric
    GROUP BY effect_id, metric
    HAVING count(*) FILTER (kind = 'target') > 0
    ORDER BY value DESC, effect_id
"""


@analysis(
    name="effects",
    needs=("effects",),
    source="paired bootstrap over documents (Efron & Tibshirani 1993)",
    section="effects",
    order=30,
)
def effects(run: Run, *, metric: Literal["delta_nll", "kl", "flips"] = "delta_nll", sweeps: bool = True) -> Result:
    """Which of the interventions measured against a run changes its predictions most?

    Every stored effect on the run, the largest first, with its interval and the range of its matched controls. Where many are
    ranked, the first is the largest partly by chance: its interval does not account for the choice.

    Args:
        metric: by which they are ranked.
        sweeps: include the effects that are part of sweeps.

    Example:
        >>> import moescope as ms
        >>> ms.analyses().set_index("name").loc["effects", "needs"]
        'effects'
    """
    frame = run.sql(_SQL, {"metric": metric}).df()
    if not sweeps:
        frame = frame[frame["sweep_id"].isna()]
    if frame.empty:
        raise InputError(
            f"no effect on run {run.name!r} has {metric}",
            fix="choose another metric, or include sweeps" if not sweeps else "choose another metric",
        )
    frame = frame.reset_index(drop=True)
    frame["intervention"] = frame["intervention"].map(subject)
    table = pa.Table.from_pandas(frame, preserve_index=False)
    table = table.set_column(1, "sweep_id", table["sweep_id"].cast(pa.string()))
    return Result(
        title=_title(frame, metric),
        table=table,
        draw=draw_ranking,
        n=len(frame),
        n_unit="interventions",
        definition=DEFINITION.partition(" content_…")[0]
        + " null, control_low and control_high: mean, smallest and largest of the controls.",
        units={"value": str(frame["unit"].iloc[0]), "n": "tokens"},
        interval=INTERVAL,
        null=NULL,
        sql=_SQL,
        sql_parameters={"run": run.run_id, "metric": metric},
        computation="interventions in words",
    )


def _title(frame: pd.DataFrame, metric: str) -> str:
    row = frame.loc[frame["value"].abs().idxmax()]
    number = with_interval(float(row["value"]), float(row["ci_low"]), float(row["ci_high"]), sign=True)
    what = metric_name(metric).removeprefix("Δ")
    most = f" most of {len(frame):,} interventions" if len(frame) > 1 else ""
    first = f"{row['intervention']} changes {what}{most}: {number} {row['unit']}"
    controlled = frame[frame["controls"] > 0]
    if controlled.empty:
        return f"{first}; {'none has' if len(frame) > 1 else 'it has no'} controls"
    low, high = controlled["control_low"], controlled["control_high"]
    outside = int(np.sum((controlled["value"] > high) | (controlled["value"] < low)))
    if len(frame) == 1:
        return f"{first}, {'outside' if outside else 'within'} the range of its controls"
    return f"{first}; {outside:,} of {len(controlled):,} with controls lie outside the range of theirs"
