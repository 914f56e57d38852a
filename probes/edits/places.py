"""The places that steps are made for, with the rule where one is needed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moescope.core.edit import Edit
from moescope.probes.anatomy import Sublayer
from moescope.probes.edits.compile import Spot
from moescope.probes.edits.router_rules import rule_for
from moescope.probes.edits.step import Place, step_for
from moescope.probes.live_model import LiveModel


def place_of(
    model: LiveModel, spot: Spot, sublayer: Sublayer | None, edits: Iterable[Edit], sources: dict[str, Any]
) -> Place:
    """The place of a spot for some edits, with its router's rule if any of them asks for it.

    Raises:
        InputError: a rule is needed, and none is verified.
    """
    uses = {step_for(edit).asks_rule(edit) for edit in edits} - {False}
    rule = None
    if sublayer is not None and uses:
        rule = rule_for(model, sublayer, "weights" if uses == {"weights"} else "choice")
    return Place(model.module, model.anatomy, spot.layer, sublayer, rule, sources)
