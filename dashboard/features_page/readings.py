"""Autoencoders of a store, and on which runs their features were read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from moescope.core.edit import edits
from moescope.core.edit_text import write_edit
from moescope.core.errors import InputError, MoescopeError
from moescope.dashboard.url_state import ViewState
from moescope.store.run import Run
from moescope.store.store import Store

_SAES_SQL = """
    WITH seen AS (
        SELECT sae_id, run_id, true AS read FROM features GROUP BY sae_id, run_id
        UNION ALL
        SELECT sae_id, run_id, false FROM sae_measures WHERE group_kind = 'all' GROUP BY sae_id, run_id
    ),
    pairs AS (
        SELECT sae_id, run_id, bool_or(read) AS read FROM seen GROUP BY sae_id, run_id
    ),
    judged AS (
        SELECT sae_id, run_id,
            max(value) FILTER (metric = 'fvu') AS fvu, max(ci_low) FILTER (metric = 'fvu') AS fvu_low,
            max(ci_high) FILTER (metric = 'fvu') AS fvu_high, max(value) FILTER (metric = 'delta_ce') AS delta_ce,
            max(ci_low) FILTER (metric = 'delta_ce') AS ce_low, max(ci_high) FILTER (metric = 'delta_ce') AS ce_high,
            max(value) FILTER (metric = 'dead_share') AS dead, max(value) FILTER (metric = 'l0') AS l0
        FROM sae_measures
        WHERE group_kind = 'all' AND condition = 'sae'
        GROUP BY sae_id, run_id
    )
    SELECT s.sae_id::VARCHAR AS sae_id, s.name, s.site, s.target_site, s.expert, s.architecture, s.trained_as, s.d_in, s.d_sae,
        s.settings -> 'spec' ->> 'k' AS k, s.vectors, t.name AS trained_on, s.trained_on IS NOT NULL AS trained_here,
        r.name AS run, coalesce(p.read, false) AS read, j.fvu, j.fvu_low, j.fvu_high, j.delta_ce, j.ce_low, j.ce_high, j.dead, j.l0,
        s.created_at
    FROM saes s
    LEFT JOIN runs t ON t.run_id = s.trained_on
    LEFT JOIN pairs p ON p.sae_id = s.sae_id
    LEFT JOIN runs r ON r.run_id = p.run_id
    LEFT JOIN judged j ON j.sae_id = p.sae_id AND j.run_id = p.run_id
    ORDER BY s.created_at DESC NULLS LAST, s.name, r.started_at DESC
"""
_SITE = re.compile(r"blocks\.(\d+)\.(.+)", re.ASCII)


@dataclass(frozen=True)
class Reading:
    """An autoencoder, and the run whose numbers stand beside it.

    Attributes:
        sae_id, name, site, expert, d_sae: of its row.
        run: where its features were read (or it was judged); None where neither was done.
        read: whether its features were.
    """

    sae_id: str
    name: str
    site: str
    expert: int | None
    d_sae: int
    run: str | None
    read: bool


def sae_rows(store: Store) -> list[dict[str, Any]]:
    """One row an autoencoder and run with numbers of it, the newest autoencoder first."""
    rows: list[dict[str, Any]] = store.sql(_SAES_SQL).to_arrow_table().to_pylist()
    return rows


def chosen_reading(rows: list[dict[str, Any]], run: Run, state: ViewState) -> Reading | None:
    """The autoencoder that the address means, else the newest; on the run shown where it was read there, else where it was.

    Raises:
        InputError: the store has no autoencoder of that name.
    """
    if not rows:
        return None
    mine = [row for row in rows if state.sae is None or state.sae in (row["name"], row["sae_id"])]
    if not mine:
        names = ", ".join(dict.fromkeys(str(row["name"]) for row in rows))
        raise InputError(
            f"this store has no autoencoder {state.sae!r}", expected=f"one of {names}", fix="choose one of the list"
        )
    best = min(mine, key=lambda row: (not row["read"], row["run"] != run.name))
    if state.sae is None:
        best = min(mine, key=lambda row: (not (row["read"] and row["run"] == run.name), not row["read"]))
    return Reading(
        best["sae_id"],
        str(best["name"]),
        str(best["site"]),
        best["expert"],
        int(best["d_sae"] or 0),
        best["run"],
        bool(best["read"]),
    )


def latent_edit(reading: Reading, feature: int, how: str, value: float) -> str | None:
    """An edit of one latent in one line; None where no edit reaches the place that the autoencoder reads.

    Example:
        >>> latent_edit(Reading("", "mine", "blocks.3.hook_mlp_out", None, 64, None, True), 7, "scale", 0.0)
        'latents layer=3 site=hook_mlp_out sae=mine latents=7 how=scale values=0'
    """
    site = _SITE.fullmatch(reading.site)
    if site is None or ";" in reading.name:
        return None
    try:
        kind: Any = edits["latents"]
        edit = kind(
            layer=int(site[1]), site=site[2], sae=reading.name, latents=[feature], how=how, values=float(f"{value:.4g}")
        )
        return write_edit(edit)
    except MoescopeError:
        return None
