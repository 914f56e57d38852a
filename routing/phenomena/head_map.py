"""Every head of a model by one number: layer × head, with intervals, ranks and key-value groups."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.routing.phenomena.head_map_figure import draw_head_map
from moescope.routing.phenomena.head_metrics import HeadMetric, head_metric, in_order
from moescope.routing.phenomena.head_records import head_name, head_record
from moescope.store.run import Run

METRICS_SQL = """
    SELECT metric, condition, count(*) AS heads
    FROM heads
    WHERE run_id = $run AND isfinite(value)
    GROUP BY metric, condition
    ORDER BY metric, condition <> 'base', condition
"""
_MAP_SQL = """
    SELECT h.layer, h.block, h.head, h.metric, h.value, c.value AS "null", h.n
    FROM heads h
    LEFT JOIN heads c ON c.run_id = h.run_id AND c.layer = h.layer AND c.block = h.block AND c.head = h.head
        AND c.condition = h.condition AND c.metric = $chance AND isfinite(c.value)
    WHERE h.run_id = $run AND h.metric = $metric AND h.condition = $condition AND isfinite(h.value)
    ORDER BY h.layer, h.block, h.head
"""
# Protocols for heads tell how many key-value heads there are; runs of the same model share it.
_GROUPS_SQL = """
    SELECT any_value(o.summary -> 'key_value_heads')
    FROM runs r
    JOIN runs o ON (o.anatomy ->> 'digest') = (r.anatomy ->> 'digest') OR o.run_id = r.run_id
    WHERE r.run_id = $run AND (o.summary -> 'key_value_heads') IS NOT NULL
"""


@analysis(
    name="head_map",
    needs=("heads",),
    source="arXiv 2410.10781 (sink scores), 2209.11895 and 2407.15891 (induction, echo), 2404.15574 (retrieval)",
    section="phenomena",
    order=56,
)
def head_map(
    run: Run, *, metric: str | None = None, condition: str | None = None, draws: Count = 300, seed: Natural = 0
) -> Result:
    """How large is one number of every attention head, and which heads lead by it?

    One row a query head with its rank, its interval where the number is known text by text, and the chance level where one is
    stored or follows from even attention. `group` is the key-value head that it reads, where a run of the same model tells how
    many there are. The colours of the figure reach from the 2nd to the 98th percentile; heads beyond are marked.

    Args:
        metric: as it stands in `heads`, for instance `sink_alpha_0`, `induction`, `entropy`; none for the first that is there.
        condition: under which it was measured; none for `base`, or the first other one where there is no `base`.
        draws: bootstrap resamples of documents.
        seed: of resampling.

    Raises:
        InputError: the run has no such metric, or not under that condition.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello, you."], store, name="a", probes=["attention"], progress=False)
        ...     ms.analyze(run, "head_map", metric="entropy").df()["metric"].unique().tolist()
        ['entropy']
    """
    name, under = _chosen(run, metric, condition)
    told = head_metric(name)
    given = {"metric": name, "condition": under, "chance": told.chance}
    frame = run.sql(_MAP_SQL, given).df()
    if told.even is not None:
        frame["null"] = frame["null"].fillna(told.even)
    frame = frame.merge(_intervals(run, name, under, draws, seed), on=["layer", "block", "head"], how="left")
    frame["rank"] = frame["value"].rank(ascending=False, method="min").astype("int64")
    frame["group"] = _groups(run, frame)
    frame = frame[["layer", "block", "head", "group", "metric", "value", "ci_low", "ci_high", "null", "rank", "n"]]
    return Result(
        title=_title(frame, told),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=draw_head_map,
        n=len(frame),
        n_unit="heads",
        definition=f"{told.words[:1].upper()}{told.words[1:]} ({told.unit}), condition {under}: mean over all observations of a head. "
        "rank: among all heads, the largest first; group: the key-value head it reads.",
        units={"value": told.unit, "n": "observations"},
        interval=f"95 % percentile bootstrap over documents, {draws} resamples; none where the number is not known text by text",
        null=_null(told),
        sql=_MAP_SQL,
        sql_parameters={"run": run.run_id, **given},
        computation="the query's rows; bootstrap over head_sequences, ranks and key-value groups",
        notes=_notes(frame),
    )


def _chosen(run: Run, metric: str | None, condition: str | None) -> tuple[str, str]:
    """The metric and condition that are meant."""
    known: dict[str, list[str]] = {}
    for name, under, _heads in run.sql(METRICS_SQL).fetchall():
        known.setdefault(str(name), []).append(str(under))
    names = in_order(list(known))
    fix = "choose one of these; more are measured by moescope phenomena, or by the probe attention"
    chosen = metric if metric is not None else (names[0] if names else "")
    if chosen not in known:
        raise InputError(
            f"run {run.name!r} has no {metric or 'finite measure'} of heads", found=", ".join(names) or "none", fix=fix
        )
    under = known[chosen][0] if condition is None else condition
    if under not in known[chosen]:
        raise InputError(
            f"{chosen} of run {run.name!r} was not measured under {condition!r}",
            found=", ".join(known[chosen]),
            fix=fix,
        )
    return chosen, under


def _intervals(run: Run, metric: str, condition: str, draws: int, seed: int) -> pd.DataFrame:
    """Bounds of every head whose number is known text by text."""
    keys = ["layer", "block", "head"]
    record = head_record(run, metric, condition=condition)
    if record is None or record.documents < 2:
        return pd.DataFrame(columns=[*keys, "ci_low", "ci_high"]).astype(
            {"layer": "int64", "block": str, "head": "int64", "ci_low": float, "ci_high": float}
        )
    return record.frame(metric, draws=draws, seed=seed)[[*keys, "ci_low", "ci_high"]]


def _groups(run: Run, frame: pd.DataFrame) -> NDArray[np.float64]:
    """The key-value head of each query head; NaN where no run of the model tells."""
    found = run.sql(_GROUPS_SQL).fetchall()
    told: dict[str, int] = json.loads(found[0][0]) if found and found[0][0] else {}
    width = frame.groupby(["layer", "block"])["head"].transform("max").to_numpy() + 1
    keys = np.array(
        [told.get(f"{layer} {block}", 0) for layer, block in zip(frame["layer"], frame["block"], strict=True)]
    )
    each = np.divide(width, keys, out=np.full(len(frame), np.nan), where=keys > 0)
    group: NDArray[np.float64] = np.floor(frame["head"].to_numpy() / each)
    return group


def _null(told: HeadMetric) -> str | None:
    if told.even is not None:
        return f"even attention: {told.even:.3g}"
    if told.chance is not None:
        return f"“{told.chance}” of the same head, where it is stored"
    return "none is stored for this number"


def _title(frame: pd.DataFrame, told: HeadMetric) -> str:
    best = frame.loc[frame["value"].idxmax()]
    name = head_name(int(best["layer"]), str(best["block"]), int(best["head"]))
    bounds = f" [{best['ci_low']:.3g}, {best['ci_high']:.3g}]" if np.isfinite(best["ci_low"]) else ""
    chance = f", {best['null']:.3g} by chance" if np.isfinite(best["null"]) else ""
    return (
        f"Of {len(frame):,} heads {name} has the largest {told.words}: {best['value']:.3g}{bounds}{chance}; "
        f"the median head has {frame['value'].median():.3g}"
    )


def _notes(frame: pd.DataFrame) -> tuple[str, ...]:
    notes = []
    if frame["group"].isna().any():
        notes.append("Key-value groups are not known: no run of this model holds a protocol for heads.")
    if frame["ci_low"].isna().all():
        notes.append("No intervals: the number is stored a head, not text by text, or there is one document.")
    return tuple(notes)
