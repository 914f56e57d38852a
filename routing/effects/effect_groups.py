"""One intervention by label, place in the text and class of token."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa

from moescope.core.analysis import analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.routing.effects.against_controls import control_means
from moescope.routing.effects.effect import DEFINITION, INTERVAL, NULL
from moescope.routing.effects.effect_figure import draw_groups
from moescope.routing.effects.metric_names import metric_name, with_interval
from moescope.routing.effects.stored_effects import ROWS_SQL, StoredEffect, stored_effect
from moescope.store.run import Run

_KINDS = ("all", "label", "position", "class")


@analysis(
    name="effect_groups",
    needs=("effects",),
    source="paired bootstrap over documents (Efron & Tibshirani 1993)",
    section="effects",
    order=20,
)
def effect_groups(
    run: Run, *, effect: str = "latest", metric: Literal["delta_nll", "kl", "flips", "base_nll"] = "delta_nll"
) -> Result:
    """Which texts and tokens does an intervention change most?

    The effect over the predicted tokens of each label, of each range of places in the sequence (0-based, the first token
    is predicted by nothing), and of each class of the predicted token, with the mean and the range of the matched controls on
    the same tokens. Intervals resample the documents that have such tokens. Groups are many, and none is corrected for that: one
    interval in twenty excludes its true value.

    Args:
        effect: its id, or the beginning of it; `latest` for the one measured last.
        metric: which number.

    Example:
        >>> import moescope as ms
        >>> ms.analyses().set_index("name").loc["effect_groups", "needs"]
        'effects'
    """
    found = stored_effect(run, effect)
    rows = found.rows[found.rows["metric"] == metric]
    targets = rows[rows["kind"] == "target"]
    if targets.empty:
        raise InputError(f"effect {found.effect_id} has no {metric}", fix="choose another metric, or another effect")
    keys = ["group_kind", "group_value"]
    frame = targets.merge(control_means(rows, keys), on=keys, how="left")
    frame["group_value"] = frame["group_value"].astype(object).where(frame["group_value"].notna(), None)
    frame["order"] = [
        _order(kind, value) for kind, value in zip(frame["group_kind"], frame["group_value"], strict=True)
    ]
    frame = frame.sort_values("order", kind="stable").reset_index(drop=True)
    frame["group"] = frame["group_value"].where(frame["group_kind"] != "all", "all tokens")
    frame["label"] = frame["group_value"].where(frame["group_kind"] == "label")
    frame["controls"] = frame["controls"].fillna(0).astype("Int64")
    columns = [
        "group_kind", "group", "label", "metric", "value", "ci_low", "ci_high", "null", "control_low", "control_high",
        "controls", "n", "unit",
    ]  # fmt: skip
    table = pa.Table.from_pandas(frame[columns], preserve_index=False)
    for name in ("label", "group"):  # a column of nothing has no type of its own
        table = table.set_column(columns.index(name), name, table[name].cast(pa.string()))
    return Result(
        title=_title(found, frame, metric),
        table=table,
        draw=draw_groups,
        n=int(frame["n"].max()),
        n_unit="predicted tokens",
        definition=DEFINITION.partition(" content_…")[0]
        + " By label of the document, place in the sequence and class of the predicted token; null, control_low and "
        "control_high: mean, smallest and largest of the controls on the same tokens.",
        units={"value": str(frame["unit"].iloc[0]), "n": "tokens"},
        interval=INTERVAL,
        null=NULL,
        sql=ROWS_SQL,
        sql_parameters={"run": run.run_id, "effect": found.effect_id},
        computation="mean and range of the controls",
        notes=(f"Effect {found.effect_id}.",),
    )


def _order(kind: str, value: str | None) -> tuple[int, int, str]:
    """All tokens first, then labels by name, places in order, classes by name."""
    first = "" if value is None else value.partition("–")[0]
    number = int(first) if kind == "position" and first.isdigit() else 0
    return _KINDS.index(kind) if kind in _KINDS else len(_KINDS), number, str(value)


def _title(found: StoredEffect, frame: pd.DataFrame, metric: str) -> str:
    groups = frame[frame["group_kind"] != "all"]
    if groups.empty:
        return f"{found.words}: {metric_name(metric)} was measured over all tokens alone"
    # The bound of the interval that is nearer to 0: what is large over few tokens alone comes last.
    surely = np.maximum(groups["ci_low"], -groups["ci_high"])
    what = metric_name(metric).removeprefix("Δ")
    if not surely.max() > 0:
        return f"{found.words} changes {what} surely in none of {len(groups)} groups of tokens: every interval holds 0"
    row = groups.loc[surely.idxmax()]
    named = {"label": "label", "position": "places", "class": "tokens of class"}.get(str(row["group_kind"]), "")
    number = with_interval(float(row["value"]), float(row["ci_low"]), float(row["ci_high"]), sign=True)
    return f"{found.words} changes {what} most surely for {named} {row['group']}: {number} {row['unit']}, over {int(row['n']):,} tokens"
