"""Effects as they lie in the store, read for an answer."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.routing.effects.edit_words import in_words
from moescope.store.run import Run

ROWS_SQL = """
    SELECT
        effect_id::VARCHAR AS effect_id,
        sweep_id::VARCHAR AS sweep_id,
        intervention::VARCHAR AS intervention,
        kind,
        draw,
        group_kind,
        group_value,
        metric,
        value,
        ci_low,
        ci_high,
        n,
        unit
    FROM effects
    WHERE base_run_id = $run AND effect_id::VARCHAR = $effect
    ORDER BY metric, group_kind, group_value, kind DESC, draw
"""
_LATEST_SQL = """
    SELECT effect_id::VARCHAR AS effect_id
    FROM effects
    WHERE base_run_id = ? AND kind = 'target' AND group_kind = 'all'
    GROUP BY effect_id
    ORDER BY bool_or(sweep_id IS NOT NULL), effect_id DESC
    LIMIT 1
"""
_KNOWN_SQL = """
    SELECT DISTINCT effect_id::VARCHAR
    FROM effects
    WHERE base_run_id = $run AND starts_with(effect_id::VARCHAR, $effect)
    LIMIT 2
"""


@dataclass(frozen=True)
class StoredEffect:
    """One effect with its controls.

    Attributes:
        effect_id: its identity.
        words: what the intervention does, as the subject of a sentence.
        rows: every row of it, the intervention's and the controls'.
    """

    effect_id: str
    words: str
    rows: pd.DataFrame

    @property
    def controls(self) -> int:
        """How many controls it was measured beside."""
        return int(self.rows.loc[self.rows["kind"] == "control", "draw"].nunique())

    def of(self, group_kind: str) -> pd.DataFrame:
        """The rows of one grouping."""
        return self.rows[self.rows["group_kind"] == group_kind]


def stored_effect(run: Run, effect: str) -> StoredEffect:
    """An effect measured against a run: `latest` (of a sweep only where there are no others), or its id, or the id's beginning.

    Raises:
        InputError: no such effect.
    """
    if effect == "latest":
        found = run.store.fetch(_LATEST_SQL, [run.run_id])
    else:
        found = run.store.fetch(_KNOWN_SQL, {"run": run.run_id, "effect": effect.lower()})
    if effect == "latest" and not found:
        raise InputError(
            f"no effect on run {run.name!r} is told over all tokens",
            fix="measure one: moescope intervene effect, or ms.effect",
        )
    if len(found) != 1:
        raise InputError(
            f"parameter 'effect' cannot be {effect!r}",
            expected="latest, or the id of an effect (the analysis effects lists them)",
            found=f"{'several effects' if found else 'no effect'} of that id on run {run.name!r}",
        )
    effect_id = str(found[0][0])
    rows = run.sql(ROWS_SQL, {"effect": effect_id}).df()
    targets = rows[rows["kind"] == "target"]
    if targets.empty or "all" not in set(targets["group_kind"]):
        raise InputError(
            f"effect {effect_id} is not told over all tokens",
            found=f"groups by {', '.join(sorted(set(rows['group_kind'])))}",
            fix="name another (the analysis effects lists them), or ask the analysis that this one was measured for",
        )
    return StoredEffect(effect_id, subject(str(targets["intervention"].iloc[0])), rows)


def subject(intervention: str) -> str:
    """An intervention's JSON as the subject of a sentence; its name where it has one, its text where it cannot be read."""
    try:
        read = Intervention.from_json(intervention)
    except InputError:
        return "An intervention of another version"
    return read.name or in_words(read)
