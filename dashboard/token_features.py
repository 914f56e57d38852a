"""What is known of an autoencoder's features on single tokens: the examples that were kept when it was read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from moescope.core.errors import InputError
from moescope.dashboard.paint import Floats
from moescope.dashboard.token_view import Part
from moescope.store.run import Run

_READ = """
    SELECT s.name, count(DISTINCT f.feature), any_value(s.site)
    FROM features f
    JOIN saes s ON s.sae_id = f.sae_id
    WHERE f.run_id = $run
    GROUP BY s.sae_id, s.name
    ORDER BY s.name
"""
_CONTEXTS = """
    SELECT c.sequence_id, c.first_position, c.activations
    FROM feature_contexts c
    JOIN saes s ON s.sae_id = c.sae_id
    WHERE c.run_id = $run AND s.name = $sae AND c.feature = $feature
"""
_TOTALS = """
    SELECT f.active, f.tokens
    FROM features f
    JOIN saes s ON s.sae_id = f.sae_id
    WHERE f.run_id = $run AND s.name = $sae AND f.feature = $feature
"""
_FIRING = """
    SELECT s.name, c.feature, max(c.activations[$position - c.first_position + 1]) AS value
    FROM feature_contexts c
    JOIN saes s ON s.sae_id = c.sae_id
    WHERE c.run_id = $run AND c.sequence_id = $sequence
        AND $position BETWEEN c.first_position AND c.first_position + len(c.activations) - 1
        AND c.activations[$position - c.first_position + 1] > 0
    GROUP BY s.name, c.feature
    ORDER BY value DESC, s.name, c.feature
    LIMIT $most
"""


@dataclass(frozen=True)
class FeatureOnTokens:
    """Activations of a feature on the tokens of a part, NaN where none was kept, and how much was kept.

    Attributes:
        values: of each token of the part.
        contexts: examples kept of the feature, over the whole run.
        active, tokens: on how many tokens it is over 0, of how many that were encoded; None where the run was not read.
    """

    values: Floats
    contexts: int
    active: int | None
    tokens: int | None


def read_autoencoders(run: Run) -> list[tuple[str, int, str]]:
    """Name, latents and site of each autoencoder whose features were read on this run."""
    return run.store.fetch(_READ, {"run": run.run_id})


def feature_on_tokens(run: Run, part: Part, sae: str | None, feature: int | None) -> FeatureOnTokens:
    """A feature's kept activations on a part.

    Raises:
        InputError: the address names no feature, or one that was not read on this run.
    """
    known = read_autoencoders(run)
    if sae is None and len(known) == 1:
        sae = known[0][0]
    if sae is None or feature is None:
        raise InputError(
            "the colour feature needs a feature",
            found="autoencoders read on this run: " + (", ".join(name for name, _, _ in known) or "none"),
            fix="give its number under Feature, or open one on the page Features",
        )
    asked = {"run": run.run_id, "sae": sae, "feature": feature}
    totals = run.store.fetch(_TOTALS, asked)
    if not totals:
        raise InputError(
            f"no feature {feature} of {sae!r} was read on run {run.name!r}",
            found="autoencoders read on it: " + (", ".join(f"{n} ({k:,} features)" for n, k, _ in known) or "none"),
            fix="choose one of these, or read its features on this run: moescope sae read",
        )
    rows = run.store.fetch(_CONTEXTS, asked)
    return FeatureOnTokens(_spread(rows, part), len(rows), *totals[0])


def firing_on(run: Run, sequence: int, position: int, *, most: int = 12) -> list[tuple[str, int, float]]:
    """Features over 0 on a token in one of the kept examples: autoencoder, feature and activation, the largest first."""
    return run.store.fetch(_FIRING, {"run": run.run_id, "sequence": sequence, "position": position, "most": most})


def _spread(rows: list[tuple[Any, ...]], part: Part) -> Floats:
    values = np.full(len(part.token), math.nan)
    starts = np.searchsorted(part.sequence, [row[0] for row in rows])
    ends = np.searchsorted(part.sequence, [row[0] for row in rows], side="right")
    for (_, first, kept), start, end in zip(rows, starts, ends, strict=True):
        begin = start + np.searchsorted(part.position[start:end], first)
        inside = part.position[begin:end] - first
        inside = inside[inside < len(kept)]
        known = np.array([math.nan if value is None else value for value in kept])[inside]
        place = slice(begin, begin + len(inside))
        values[place] = np.where(np.isnan(known), values[place], known)
    return values
