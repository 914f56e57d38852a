"""Judged autoencoders of a run: which there are, what was measured of them, and what to call it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.store.run import Run

JUDGED_SQL = """
    SELECT s.sae_id::VARCHAR AS sae_id, coalesce(s.name, m.sae_id::VARCHAR) AS sae, s.architecture, s.site, s.target_site, s.expert,
        s.d_sae, m.condition, m.metric, m.value, m.ci_low, m.ci_high, m.n, m.unit
    FROM sae_measures m
    JOIN saes s USING (sae_id)
    WHERE m.run_id = $run AND m.group_kind = 'all' AND m.metric IN ('fvu', 'l0', 'delta_ce', 'loss_recovered_zero',
        'loss_recovered_mean', 'kl', 'flips', 'dead_share', 'dense_share', 'probe_loss', 'ablation_sparsity', 'absorption', 'splitting')
    ORDER BY s.created_at NULLS FIRST, sae, m.metric, m.condition
"""
# Condition → words, the best first.
CONDITIONS = {
    "sae": "autoencoder",
    "pca_topk": "PCA, each vector's largest k",
    "pca": "PCA, the first k",
    "random_decoder": "random decoder, k rows",
    "random_direction": "random direction",
    "mean": "mean",
    "zero": "zero",
    "shuffled": "shuffled decoder rows",
    "prior": "share alone",
    "base": "model as it is",
}
FIX = "judge one: moescope sae judge, or ms.sae.judge"


@dataclass(frozen=True)
class JudgedSae:
    """An autoencoder that was judged on a run.

    Attributes:
        sae_id, name, site, architecture, d_sae: of its row.
    """

    sae_id: str
    name: str
    site: str
    architecture: str
    d_sae: int


def judged_frame(run: Run) -> pd.DataFrame:
    """What was measured over all tokens of every autoencoder judged on a run, the newest last.

    Raises:
        InputError: none was judged on it.
    """
    frame = run.sql(JUDGED_SQL).df()
    if not (frame["metric"] == "fvu").any():
        raise InputError(f"no autoencoder was judged on run {run.name!r}", fix=FIX)
    return frame


def judged_sae(run: Run, sae: str | None) -> JudgedSae:
    """The autoencoder of that name or `sae_id` judged on a run; the newest where None.

    Raises:
        InputError: it was not judged on it.
    """
    frame = judged_frame(run)
    frame = frame[frame["metric"] == "fvu"]
    mine = frame if sae is None else frame[(frame["sae"] == sae) | (frame["sae_id"] == sae)]
    if mine.empty:
        names = ", ".join(dict.fromkeys(frame["sae"]))
        raise InputError(
            f"no autoencoder {sae!r} was judged on run {run.name!r}",
            expected=f"one of {names}",
            fix=f"name one, or {FIX}",
        )
    row = mine.iloc[-1]
    size = 0 if pd.isna(row["d_sae"]) else int(row["d_sae"])
    return JudgedSae(str(row["sae_id"]), str(row["sae"]), str(row["site"]), str(row["architecture"]), size)


def one_site(frame: pd.DataFrame, site: str | None) -> tuple[pd.DataFrame, str]:
    """Rows of the autoencoders at one place, and the place: that asked for, or the one with most of them.

    A place is a site, with target and expert where there are any.

    Raises:
        InputError: none at that site.
    """
    place = [_place(*row) for row in zip(frame["site"], frame["target_site"], frame["expert"], strict=True)]
    frame = frame.assign(place=place)
    if site is None:
        site = str(frame.groupby("place", sort=False)["sae_id"].nunique().idxmax())
    mine = frame[frame["place"] == site]
    if mine.empty:
        mine = frame[frame["site"] == site]
    if mine.empty:
        places = ", ".join(dict.fromkeys(place))
        raise InputError(f"no autoencoder at {site!r} was judged on this run", expected=f"one of {places}")
    return mine, site


def wide(frame: pd.DataFrame, condition: str = "sae") -> pd.DataFrame:
    """One row an autoencoder: its numbers, each measure of one condition in a column."""
    part = frame[frame["condition"] == condition]
    values = part.pivot_table(index="sae_id", columns="metric", values="value", aggfunc="first", sort=False)
    facts = frame.drop_duplicates("sae_id").set_index("sae_id")[["sae", "architecture", "d_sae"]]
    for needed in ("fvu", "l0"):
        if needed not in values:
            values[needed] = float("nan")
    return facts.join(values, how="inner")


def spread_ticks(values: NDArray[np.floating[Any]]) -> list[float]:
    """Ticks of a logarithmic axis: the values themselves where they are few, else round numbers among them.

    Example:
        >>> spread_ticks(np.array([8.0, 16.0, 32.0]))
        [8.0, 16.0, 32.0]
        >>> spread_ticks(np.linspace(0.14, 0.33, 20))
        [0.15, 0.2, 0.3]
    """
    there = values[np.isfinite(values) & (values > 0)]
    few = sorted({float(f"{value:.3g}") for value in there})
    if not few or (len(few) <= 6 and all(b > 1.2 * a for a, b in pairwise(few))):
        return few
    powers = range(int(np.floor(np.log10(few[0]))), int(np.ceil(np.log10(few[-1]))) + 1)
    steps = (1, 1.5, 2, 3, 5, 7) if few[-1] < 10 * few[0] else (1, 2, 5) if few[-1] < 300 * few[0] else (1,)
    found = [float(f"{step * 10.0**power:.3g}") for power in powers for step in steps]
    return [tick for tick in found if few[0] / 1.1 <= tick <= few[-1] * 1.1] or few[:1]


def _place(site: str, target: str | None, expert: float | None) -> str:
    text = site if pd.isna(target) else f"{site} → {target}"
    return text if pd.isna(expert) else f"{text}, expert {int(expert or 0)}"
