"""Massive activations of a run as frames: the largest activation of every text and layer, and each one that is massive."""

from __future__ import annotations

import numpy as np
import pandas as pd

from moescope.core.errors import InputError
from moescope.store.run import Run

SMALLEST, RATIO = 100.0, 1000.0
FORMING_RISE = 0.1

# In one text at one layer the median is the same for all tokens, so that its largest |x| is also nearest to being massive.
LARGEST_SQL = """
    WITH tops AS (
        SELECT r.layer, t.sequence_id, count(*) AS n,
            max(struct_pack(
                size := abs(r.top_values[1]), earlier := -r.token, signed := r.top_values[1], channel := r.top_channels[1],
                position := t.position, token_id := t.token_id
            )) AS top
        FROM residual r
        JOIN tokens t ON t.run_id = r.run_id AND t.token = r.token
        WHERE r.run_id = $run AND isfinite(r.top_values[1])
        GROUP BY r.layer, t.sequence_id
    )
    SELECT o.layer, o.sequence_id, s.document_id, o.n, o.top.size::DOUBLE AS value, o.top.signed::DOUBLE AS signed,
        o.top.channel::INTEGER AS channel, (-o.top.earlier)::BIGINT AS token, o.top.position AS position,
        o.top.token_id AS token_id, m.median_abs::DOUBLE AS median_abs
    FROM tops o
    JOIN sequences s ON s.run_id = $run AND s.sequence_id = o.sequence_id
    JOIN residual_sequences m ON m.run_id = $run AND m.sequence_id = o.sequence_id AND m.layer = o.layer
    WHERE isfinite(m.median_abs)
    ORDER BY o.layer, o.sequence_id
"""

# The three largest channels of each token are known also where massive activations were not recorded as such.
MASSIVE_SQL = """
    WITH tops AS (
        SELECT r.layer, r.token, r.top_values, r.top_channels, m.median_abs::DOUBLE AS median_abs
        FROM residual r
        JOIN tokens t ON t.run_id = r.run_id AND t.token = r.token
        JOIN residual_sequences m ON m.run_id = r.run_id AND m.sequence_id = t.sequence_id AND m.layer = r.layer
        WHERE r.run_id = $run AND abs(r.top_values[1]) > 100 AND abs(r.top_values[1])::DOUBLE >= 1000 * m.median_abs::DOUBLE
    ), three AS (
        SELECT layer, token, median_abs, unnest(top_values)::DOUBLE AS signed, unnest(top_channels)::INTEGER AS channel
        FROM tops
    ), found AS (
        SELECT layer, token, channel, value AS signed, ratio, TRUE AS recorded
        FROM massive_activations
        WHERE run_id = $run
        UNION ALL
        SELECT layer, token, channel, signed, abs(signed) / median_abs, FALSE
        FROM three
        ANTI JOIN (SELECT * FROM massive_activations WHERE run_id = $run) USING (layer, token, channel)
        WHERE isfinite(signed) AND abs(signed) > 100 AND abs(signed) >= 1000 * median_abs
    )
    SELECT f.layer, f.token, f.channel, f.signed, abs(f.signed) AS value, f.ratio, f.recorded, t.sequence_id, t.position,
        t.token_id, t.phase, s.document_id
    FROM found f
    JOIN tokens t ON t.run_id = $run AND t.token = f.token
    JOIN sequences s ON s.run_id = $run AND s.sequence_id = t.sequence_id
    ORDER BY f.layer, f.token, f.channel
"""


def largest_of_texts(run: Run) -> pd.DataFrame:
    """One row a layer and text: its largest |x| with token and channel, the median |x|, and whether it is massive.

    Raises:
        InputError: no activation of the run is finite.
    """
    frame = run.sql(LARGEST_SQL).df()
    if frame.empty:
        raise InputError(
            f"run {run.name!r} has no finite activation", found="only NaN or infinity: the model overflowed"
        )
    frame["ratio"] = ratio_to(frame["value"], frame["median_abs"])
    frame["threshold"] = np.maximum(SMALLEST, RATIO * frame["median_abs"])
    frame["massive"] = (frame["value"] > SMALLEST) & (frame["value"] >= RATIO * frame["median_abs"])
    return frame


def massive_activations_of(run: Run) -> tuple[pd.DataFrame, bool]:
    """One row a massive activation, and whether all of them were recorded as such.

    Where they were not, up to three a token are known, from the table `residual`.
    """
    frame = run.sql(MASSIVE_SQL).df()
    return frame, bool(frame["recorded"].all())


def ratio_to(value: pd.Series, median: pd.Series) -> pd.Series:
    """|x| over the median |x|; infinite where that is 0 and the activation is not."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (value / median).fillna(0.0)


def top_by_layer(largest: pd.DataFrame) -> pd.DataFrame:
    """The row of the largest |x| of each layer, the earliest token first; `forms` says where massive activations form.

    A block forms massive activations where its output has some and the largest |x| of the stream rises over that of the
    block before by at least a tenth of the largest |x| anywhere (before the first block nothing is recorded, and 0 is taken).
    """
    order = largest.sort_values(["layer", "value", "token"], ascending=[True, False, True])
    top = order.groupby("layer", as_index=False).first()
    tokens = largest.groupby("layer")["n"].sum()
    some = largest.groupby("layer")["massive"].any()
    top["n"] = top["layer"].map(tokens)
    top["any_massive"] = top["layer"].map(some).astype(bool)
    rise = top["value"].diff().fillna(top["value"])
    top["forms"] = top["any_massive"] & (rise >= FORMING_RISE * top["value"].max())
    return top


def forming_layers(run: Run) -> list[int] | None:
    """Layers whose block forms massive activations; None where the residual stream was not recorded."""
    if not (run.rows("residual") and run.rows("residual_sequences")):
        return None
    top = top_by_layer(largest_of_texts(run))
    return [int(layer) for layer in top.loc[top["forms"], "layer"]]
