"""`Splice` at the outputs of single experts: reconstructions in the place of what chosen experts put out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import nn

from moescope.core.edit_kinds.features import Splice
from moescope.probes.edits.decision_steps import TokenStep
from moescope.probes.edits.now import Now
from moescope.probes.edits.step import Decision, Place, step
from moescope.probes.edits.steps.features import Encoder, autoencoder_fault, reads_of, why_not_here
from moescope.probes.edits.steps.stream import strength_fault
from moescope.probes.expert_access import why_unreachable


@step("splice:slots")
class SpliceSlotsStep(TokenStep[Splice]):
    """weight · (out + strength · (reconstruction − out)) in every slot, or in those of the one expert that the autoencoder
    is of.

    What each slot put out is computed a second time, every (token, slot) pair as a row of its own, and the difference added
    to the experts' output: slots without an edit keep every bit.
    """

    phase: ClassVar[int] = 2
    graded: ClassVar[bool] = True
    after: ClassVar[bool] = True

    def __init__(self, edits: Sequence[Any], place: Place) -> None:
        edit: Splice = next(edit for edit in edits if edit is not None)
        self.autoencoder: Encoder = place.sources[edit.sae]
        self.expert: int | None = getattr(self.autoencoder, "expert", None)
        self.keeps = edit.keep_error
        super().__init__(edits, place)

    @staticmethod
    def form(edit: Splice) -> Any:
        """The autoencoder, and whether its error is kept."""
        return edit.sae, edit.keep_error

    @staticmethod
    def why_not(edit: Splice, place: Place) -> str | None:
        """Slots that can be computed alone, and an autoencoder of them."""
        return (
            autoencoder_fault(edit, place)
            or _why_no_slots(place)
            or _why_no_slots_of(place.sources[edit.sae], place)
            or why_not_here(place.sources[edit.sae], edit, place)
            or strength_fault(edit)
        )

    def fill(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Nothing but positions and strengths."""

    def decide(self, decision: Decision, now: Now) -> None:
        """The decision stays: outputs are changed when they are there."""

    def outputs(self, experts: nn.Module, decision: Decision, now: Now) -> Float[torch.Tensor, "token d_model"] | None:
        """What is added to the experts' output so that reconstructions stand in the slots."""
        if self.keeps:
            return None
        ids, weights = decision.ids, decision.weights
        tokens, k = ids.shape
        rows = decision.hidden.reshape(tokens, -1).repeat(k, 1)  # slot-major, as a loop over experts meets slots
        index = ids.t().reshape(-1, 1)
        # Past whatever reads this module: these rows are not the model's own.
        forward: Any = type(experts).forward
        with torch.no_grad():
            out = forward(experts, rows, index, torch.ones_like(index, dtype=weights.dtype)).float()
        found = self.autoencoder.decode(self.autoencoder.encode(out.to(self.autoencoder.decoder.device)))
        change = (found.to(out) - out).reshape(k, tokens, -1).transpose(0, 1)
        mine = ids < (self.place.sublayer.n_experts or 0) if self.place.sublayer is not None else ids >= 0
        if self.expert is not None:
            mine = ids == self.expert
        share = torch.where(mine, weights.float() * self.amount(now)[:, None].to(weights.device), 0.0)
        return torch.where((share != 0)[..., None], share[..., None] * change, 0.0).sum(1)


def _why_no_slots(place: Place) -> str | None:
    """Why the slots of a router cannot be computed alone; None where they can."""
    s = place.sublayer
    if s is None or s.reader != "experts":
        return "what its experts put out cannot be computed slot by slot"
    experts = place.model.get_submodule(s.experts_path or "")
    if hasattr(experts, "_hf_hook"):
        return "its experts' weights are brought in only while they run"
    return why_unreachable(experts)


def _why_no_slots_of(autoencoder: Any, place: Place) -> str | None:
    """Why an autoencoder is of no slot of a router; None where it is."""
    if reads_of(autoencoder) is not None:
        return "it is a transcoder, which predicts no slot from itself"
    n = (place.sublayer.n_experts if place.sublayer is not None else None) or 0
    expert = getattr(autoencoder, "expert", None)
    return (
        None
        if expert is None or 0 <= expert < n
        else f"it is of expert {expert}, and the layer has experts 0 to {n - 1}"
    )
