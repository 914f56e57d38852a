"""What a recording under an intervention needs: the session of edits, and what is no longer true of edited routers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.probes.anatomy import Anatomy
from moescope.probes.batches import Sequence as BatchSequence
from moescope.probes.edits.checks import check_intervention
from moescope.probes.edits.compile import spots_of
from moescope.probes.edits.session import Edited, edited, interventions_in_force
from moescope.probes.edits.slot_numbers import slots_under
from moescope.probes.effects.sources import sources_of
from moescope.probes.live_model import LiveModel
from moescope.probes.routing_rule import BoundRule
from moescope.store.store import Store

Router = tuple[int, str]


class EditedRecording:
    """An intervention as a recording holds it.

    Args:
        model: what is recorded.
        intervention: how it is edited.
        store: where the runs lie that edits replay.
        generate: tokens to continue each sequence by: 0.
        sources: name → autoencoder, for edits that go through one.

    Raises:
        InputError: edits the model cannot take, or no edits at all; a recording that generates.

    Attributes:
        anatomy: the model's, with the number of experts a token takes under the edits.
    """

    def __init__(
        self,
        model: LiveModel,
        intervention: Intervention,
        store: Store,
        *,
        generate: int,
        sources: Mapping[str, Any] | None = None,
    ) -> None:
        if not intervention.edits:
            raise InputError("the intervention is empty", fix="give it at least one edit, or leave it out")
        if generate:
            raise InputError(
                "a run under an intervention records no generated tokens",
                found=f"generate={generate}",
                fix="leave out generate (--generate); what an edited model writes is measured by intervene effect --generate",
            )
        self._model, self._intervention = model, intervention
        self._sources = sources_of(intervention, store, sources)
        self._session: Edited | None = None
        check_intervention(model, intervention, sources=self._sources)
        self.anatomy = _as_edited(model.anatomy, intervention)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Edits hold while the context lasts."""
        with edited(self._model, self._intervention, sources=self._sources) as session:
            self._session = session
            try:
                yield
            finally:
                self._session = None

    def begin(self, sequences: Sequence[BatchSequence]) -> None:
        """Say which sequences the next pass runs."""
        assert self._session is not None
        self._session.begin([sequence.sequence_id for sequence in sequences])

    def check(self) -> None:
        """Raise `RunError` where a pass gave logits that are no numbers."""
        assert self._session is not None
        self._session.check_finite()

    def rules_left(self, rules: Mapping[Router, BoundRule]) -> dict[Router, BoundRule]:
        """The rules of routers whose decisions stay their own."""
        changed = {
            (spot.layer, spot.block)
            for edit in self._intervention.edits
            for spot, _ in spots_of(edit, self._model.anatomy)
            if spot.where == "decision"
        }
        return {place: rule for place, rule in rules.items() if place not in changed}

    def as_json(self) -> dict[str, Any]:
        """The intervention as it is stored with the run."""
        found: dict[str, Any] = self._intervention.to_data()
        return found


def in_force(model: LiveModel) -> dict[str, Any] | None:
    """The intervention of the session that lasts around a recording, as it is stored with the run; None without any.

    Raises:
        InputError: a session of several interventions: rows of one run would be under different ones.
    """
    here = interventions_in_force(model)
    if len(here) > 1:
        raise InputError(
            "a run is of one intervention",
            found=f"a session of {len(here)}",
            fix="record each by itself: record(…, intervention=…)",
        )
    return here[0].to_data() if here and here[0].edits else None


def _as_edited(anatomy: Anatomy, intervention: Intervention) -> Anatomy:
    """The anatomy with as many slots a token as the edits give it."""
    slots = slots_under(intervention, anatomy)
    sublayers = (replace(s, top_k=slots.get((s.layer, s.block), s.top_k)) for s in anatomy.sublayers)
    return replace(anatomy, sublayers=tuple(sublayers))
