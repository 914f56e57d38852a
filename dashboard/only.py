"""Sequences that have something in them: an expert that is used, a feature whose activations were kept."""

from __future__ import annotations

from moescope.core.errors import InputError
from moescope.dashboard.records import find_router, routers
from moescope.dashboard.url_state import ViewState
from moescope.store.run import Run

ONLY = ("expert", "feature")

_WITH_EXPERT = """
    WITH used AS (
        SELECT token
        FROM routing
        WHERE run_id = $run AND layer = $layer AND block = $block AND list_contains(experts, $expert)
    )
    SELECT list(DISTINCT t.sequence_id)
    FROM used
    JOIN tokens t ON t.run_id = $run AND t.token = used.token
"""
_WITH_FEATURE = """
    SELECT list(DISTINCT c.sequence_id)
    FROM feature_contexts c
    JOIN saes s ON s.sae_id = c.sae_id
    WHERE c.run_id = $run AND ($sae IS NULL OR s.name = $sae) AND c.feature = $feature
"""


def sequences_with(run: Run, state: ViewState) -> list[int] | None:
    """The sequences that the parameter `only` leaves; None where it is not given, and all are meant.

    `only=expert` keeps those with a token that chose the expert in focus at the layer in focus, `only=feature` those with a
    kept context of the feature in focus.

    Raises:
        InputError: `only` is something else, or names what the address does not give.
    """
    only = state.given("only")
    if not only:
        return None
    if only not in ONLY:
        raise InputError(f"the address has only={only[:40]!r}", expected=" or ".join(ONLY), fix="take it away")
    if only == "expert" and (state.expert is None or state.expert < 0):  # shared experts see every token
        return None
    if only == "feature" and state.feature is None:
        return None
    if only == "expert":
        router = find_router(run, state, routers(run))
        asked = {"layer": router.layer, "block": router.block, "expert": state.expert}
        rows = run.store.fetch(_WITH_EXPERT, {"run": run.run_id, **asked})
    else:
        rows = run.store.fetch(_WITH_FEATURE, {"run": run.run_id, "sae": state.sae, "feature": state.feature})
    return [int(sequence) for sequence in rows[0][0] or []]
