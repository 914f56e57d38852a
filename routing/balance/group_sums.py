"""Sums over the tokens of each router, group and document, and their ratios with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from moescope.core.errors import InputError
from moescope.core.statistics import bootstrap_ratio
from moescope.routing.balance.groups import MOST_UNITS, By
from moescope.routing.grid import layer_name
from moescope.store.run import Run

# Tokens with their group (`place`) and the document, or bundle of documents, that they are resampled with (`unit`).
PLACES = """
    WITH ends AS (
        SELECT sequence_id, max(position) + 1 AS length
        FROM tokens
        WHERE run_id = $run
        GROUP BY sequence_id
    ),
    places AS (
        SELECT
            t.token,
            s.document_id % $units AS unit,
            CASE $by
                WHEN 'label' THEN s.label
                WHEN 'phase' THEN t.phase::VARCHAR
                WHEN 'class' THEN t.class::VARCHAR
                WHEN 'position' THEN lpad((t.position::BIGINT * $bins // e.length)::VARCHAR, 6, '0')
                ELSE 'all'
            END AS place
        FROM tokens t
        JOIN sequences s ON s.run_id = t.run_id AND s.sequence_id = t.sequence_id
        JOIN ends e ON e.sequence_id = t.sequence_id
        WHERE t.run_id = $run
    )
"""
_FIXES = {
    "label": ("labelled documents", 'give documents a "label" (--label-field), and record again'),
    "class": ("tokens with a class", "record it from a live model with its tokenizer"),
}
_DOCUMENTS = """
    SELECT count(DISTINCT document_id), max(document_id) + 1
    FROM sequences
    WHERE run_id = $run
"""


def place_parameters(run: Run, by: By, bins: int) -> dict[str, Any]:
    """The parameters of `PLACES`; `units` is what documents are bundled by."""
    documents, highest = run.sql(_DOCUMENTS).fetchall()[0]
    units = MOST_UNITS if documents > MOST_UNITS else int(highest)
    return {"by": by, "bins": bins, "units": units}


def group_sums(run: Run, query: str, parameters: Mapping[str, Any]) -> pd.DataFrame:
    """Rows of a query with columns layer, block, place, unit and sums.

    Raises:
        InputError: groups are labels or classes of tokens, and there is none.
    """
    found = run.sql(query, parameters).df()
    if parameters["by"] in _FIXES and found.empty:
        name, fix = _FIXES[parameters["by"]]
        raise InputError(f"run {run.name!r} has no {name}, or no records of them", fix=fix)
    return found


def mean_rows(
    found: pd.DataFrame, parameters: Mapping[str, Any], *, metric: str, total: str, count: str, draws: int, seed: int
) -> pd.DataFrame:
    """Means of one metric for each router and group, with intervals over documents.

    Args:
        found: what `group_sums` gave.
        parameters: those it was asked with.
        metric: what the mean is called.
        total, count: columns of sums, and of what they are divided by.
        draws, seed: of the resampling.

    Returns:
        layer, block, the group's column, metric, value, ci_low, ci_high, n; groups without any count are left out.
    """
    groups = found.groupby(["layer", "block", "place"], sort=True)
    number = groups.ngroup().to_numpy()
    keys = pd.DataFrame(list(groups.groups), columns=["layer", "block", "place"])
    units, unit = np.unique(found["unit"], return_inverse=True)
    sums = np.zeros((2, len(units), len(keys)))
    for place, column in enumerate((total, count)):
        np.add.at(sums[place], (unit, number), found[column].fillna(0).to_numpy(dtype=np.float64))
    value, low, high = bootstrap_ratio(sums[0], sums[1], draws=draws, seed=seed)
    alone = (sums[1] > 0).sum(0) < 2
    low, high = np.where(alone, np.nan, low), np.where(alone, np.nan, high)
    n = sums[1].sum(0).astype(np.int64)
    by = parameters["by"]
    named = {} if by == "layer" else {by: [_named(place, parameters) for place in keys["place"]]}
    rows = pd.DataFrame(
        {"layer": keys["layer"].astype(int), "block": keys["block"], **named, "metric": metric}
        | {"value": value, "ci_low": low, "ci_high": high, "n": n}
    )
    return rows[n > 0]


def _named(place: str, parameters: Mapping[str, Any]) -> str:
    if parameters["by"] != "position":
        return place
    bins = parameters["bins"]
    return f"{100 * int(place) / bins:.3g}–{100 * (int(place) + 1) / bins:.3g} %"


def percentile_interval(parameters: Mapping[str, Any], draws: int) -> str:
    """What the intervals are, in words."""
    bundles = f" ({MOST_UNITS:,} bundles of documents)" if parameters["units"] == MOST_UNITS else ""
    return f"95 % percentile bootstrap over documents{bundles}, {draws} resamples"


def row_name(row: Any, by: By) -> str:
    """`L3`, or `L3 · law` where tokens are in groups."""
    name = layer_name(int(row["layer"]), str(row["block"]))
    return name if by == "layer" else f"{name} · {row[by]}"
