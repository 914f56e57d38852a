"""Measures of experts from what was measured of an autoencoder's latents."""

from __future__ import annotations

import pandas as pd

from moescope.core.errors import InputError
from moescope.routing.experts.readings import KEY, Read, Reading, asked
from moescope.routing.features.expert_pairs import MAIN, PAIRS_SQL, Pairs, read_pairs
from moescope.store.run import Run


def features_written(run: Run, _label: str | None) -> Reading:
    """For how many latents an expert is the one that writes most of all experts of its layer."""
    pairs, held = _held(run, "writes")
    best = held.loc[held.groupby(["layer", "block", "feature"])["value"].idxmax()]
    best = best[best["value"] > 0]
    count = best.groupby(KEY).size().rename("value").reset_index()
    every = held[KEY].drop_duplicates()
    frame = every.merge(count, on=KEY, how="left").fillna({"value": 0})
    return _reading(run, pairs, frame.assign(n=held["feature"].nunique()), held)


def strongest_latent(side: str) -> Read:
    """The largest number over latents, and which latent it is."""

    def read(run: Run, _label: str | None) -> Reading:
        pairs, held = _held(run, side)
        best = held.loc[held.groupby(KEY)["value"].idxmax()]
        frame = best[[*KEY, "value", "n"]].assign(detail=[f"latent F{feature}" for feature in best["feature"]])
        return _reading(run, pairs, frame, held)

    return read


def _held(run: Run, side: str) -> tuple[Pairs, pd.DataFrame]:
    asked(run, "expert_features", side=side)
    pairs = read_pairs(run, None)
    held = pairs.of(MAIN[side])
    held = held[(held["expert"] >= 0) & held["value"].notna()].reset_index(drop=True)
    if held.empty:
        raise InputError(
            f"run {run.name!r} has no routed expert measured beside latents", fix="measure them: moescope sae experts"
        )
    return pairs, held


def _reading(run: Run, pairs: Pairs, frame: pd.DataFrame, held: pd.DataFrame) -> Reading:
    return Reading(
        frame,
        int(held["feature"].nunique()),
        "latents",
        sql=PAIRS_SQL,
        parameters=pairs.parameters(run),
        computation="the largest of each latent, or of each expert",
        notes=(f"Autoencoder {pairs.sae.name} at {pairs.sae.site}.",),
    )
