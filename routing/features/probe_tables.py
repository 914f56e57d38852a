"""Sparse probes as they lie in the store: one row a number, with both of its nulls beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from moescope.core.errors import InputError
from moescope.store.run import Run

KINDS = {"neuron": "neurons", "latent": "latents", "expert": "experts", "router_logit": "router logits"}

PROBES_SQL = """
    SELECT p.unit_kind, s.name AS sae, p.site, p.concept, p.ranking, p.k, p.metric,
        any_value(p.value) AS value, any_value(p.ci_low) AS ci_low, any_value(p.ci_high) AS ci_high,
        max(p.null_value) FILTER (WHERE p.null_kind LIKE 'labels %') AS "null",
        max(p.null_value) FILTER (WHERE p.null_kind = 'random units') AS random,
        any_value(p.units[1]) AS unit, any_value(p.coefficients[1]) AS coefficient, any_value(p.n) AS n
    FROM sparse_probes p
    LEFT JOIN saes s ON s.sae_id = p.sae_id
    WHERE p.run_id = $run
        AND p.metric IN ($metric, 'sparsity')
        AND ($sae IS NULL OR p.sae_id IS NULL OR s.name = $sae OR CAST(p.sae_id AS VARCHAR) = $sae)
        AND ($ranking IS NULL OR p.ranking IN ($ranking, 'all'))
        AND ($concept IS NULL OR p.concept = $concept)
    GROUP BY p.probe_id, p.unit_kind, s.name, p.site, p.concept, p.ranking, p.k, p.metric
    ORDER BY p.unit_kind, p.site, s.name, p.concept, p.ranking, p.k, p.metric
"""
_NAMES_SQL = """
    SELECT DISTINCT p.concept, p.ranking, s.name, CAST(p.sae_id AS VARCHAR), s.created_at
    FROM sparse_probes p
    LEFT JOIN saes s ON s.sae_id = p.sae_id
    WHERE p.run_id = $run
    ORDER BY s.created_at DESC
"""


@dataclass(frozen=True)
class Probes:
    """Probes of a run.

    Attributes:
        frame: a row a probe and metric, with `reads`, the units' name in words.
        parameters: of the query.
    """

    frame: pd.DataFrame
    parameters: dict[str, Any]


def read_probes(run: Run, *, metric: str, concept: str | None, ranking: str | None, sae: str | None) -> Probes:
    """Probes of a run; of latents those of one autoencoder, the newest where none is named.

    Raises:
        InputError: a concept, ranking or autoencoder that was not probed; the message names those that were.
    """
    known = run.sql(_NAMES_SQL).fetchall()
    for what, asked, at in (("concept", concept, (0,)), ("ranking", ranking, (1,)), ("autoencoder", sae, (2, 3))):
        names = list(dict.fromkeys(str(row[i]) for row in known for i in at if row[i] is not None))
        if asked is not None and asked not in names:
            raise InputError(
                f"run {run.name!r} has no probes of {what} {asked!r}",
                expected=", ".join(name for name in names[:12] if name != "all") or "none",
                fix="probe for it: moescope sae probe",
            )
    newest = next((row[3] for row in known if row[3] is not None), None)
    given: dict[str, Any] = {
        "run": run.run_id, "metric": metric, "sae": sae or newest, "ranking": ranking, "concept": concept,
    }  # fmt: skip
    frame = run.store.sql(PROBES_SQL, given).df()
    if not (frame["metric"] == metric).any():
        raise InputError(f"run {run.name!r} has no such probes", fix="probe for it: moescope sae probe")
    for column in ("value", "ci_low", "ci_high", "null", "random", "coefficient"):
        frame[column] = frame[column].astype(float)
    frame["reads"] = [_reads(row, several=frame["site"].nunique() > 1) for row in frame.to_dict("records")]
    return Probes(frame, given)


def common_concepts(frame: pd.DataFrame) -> tuple[list[str], tuple[str, ...]]:
    """Concepts that every kind of unit was probed for, and what to say where others were left out of means; all where none is common."""
    probed = frame.groupby("reads", sort=False)["concept"].agg(set)
    common = sorted(set.intersection(*probed))
    everything = sorted(set.union(*probed))
    if not common:
        return everything, (
            "No concept was probed for with all of the units shown: their means are over different concepts.",
        )
    if len(common) < len(everything):
        told = f"Means are over the {len(common)} of {len(everything)} concepts that were probed for with all of the units shown."
        return common, (told,)
    return common, ()


def tested_notes(frame: pd.DataFrame) -> tuple[str, ...]:
    """Says where kinds of units were tested on different rows."""
    sizes = frame.groupby("reads", sort=False)["n"].max()
    if sizes.nunique() < 2:
        return ()
    listed = ", ".join(f"{name} {int(n):,}" for name, n in sizes.items())
    return (
        f"Not all were tested on the same rows ({listed}): an autoencoder trained on this run is tested on documents it has not seen; "
        "probe other units with the same sae to compare like with like.",
    )


def _reads(row: dict[str, Any], *, several: bool) -> str:
    """What a probe reads, in words."""
    kind = KINDS.get(row["unit_kind"], row["unit_kind"])
    if isinstance(row["sae"], str):
        return f"{kind} of {row['sae']}"
    if row["unit_kind"] == "neuron" and "hook_post" not in row["site"]:
        return f"components of {row['site']}"
    return f"{kind}, {row['site']}" if several and row["site"].startswith("blocks.") else kind
