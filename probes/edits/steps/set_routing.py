"""The step that gives experts the decisions of a recorded run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from moescope.core.edit_kinds.experts import SetRouting
from moescope.core.errors import InputError, RunError
from moescope.probes.edits.decision_steps import TokenStep
from moescope.probes.edits.now import Now
from moescope.probes.edits.step import Decision, Place, step
from moescope.probes.edits.stored_routing import StoredRouting, stored_routing


@dataclass
class _Trace:
    """Recorded decisions of a batch at one router, on the device."""

    sequences: tuple[int, ...]
    ids: Int[torch.Tensor, "row position k"]
    weights: Float[torch.Tensor, "row position k"]
    known: Bool[torch.Tensor, "row position"]
    tokens: Int[torch.Tensor, "row position"]


@step("set_routing")
class SetRoutingStep(TokenStep[SetRouting]):
    """Recorded decisions at every token the run has one for.

    Where the recorded experts are those the token has anyway, slots stay where they are, and what does not differ from the
    record keeps every bit.
    """

    def __init__(self, edits: Sequence[Any], place: Place) -> None:
        self.trace: _Trace | None = None
        self.other_text: torch.Tensor | None = None
        self.named: SetRouting = next(edit for edit in edits if edit is not None)
        self.reads_logits = self.named.weights == "own"
        super().__init__(edits, place)

    @staticmethod
    def form(edit: SetRouting) -> Any:
        """The run, and whose weights."""
        return edit.run, edit.weights

    @classmethod
    def asks_rule(cls, edit: SetRouting) -> bool | Literal["weights"]:
        """Own weights come from the rule."""
        return "weights" if edit.weights == "own" else False

    @staticmethod
    def why_not(edit: SetRouting, place: Place) -> str | None:
        """The run must be given, and have as many experts at the same place."""
        run, s = place.sources.get(edit.run), place.sublayer
        if run is None:
            given = ", ".join(map(repr, place.sources)) or "none"
            return f"the run {edit.run!r} is not among the given ones ({given}); pass sources={{{edit.run!r}: run}}"
        query = "SELECT n_experts, top_k FROM layers WHERE run_id = ? AND layer = ? AND block = ?"
        found = run.store.fetch(query, [run.run_id, place.layer, edit.block])
        if s is not None and found != [(s.n_experts, s.top_k)]:
            recorded = f"{found[0][0]} experts, top-{found[0][1]}" if found else "no router"
            return f"the run has {recorded} there, and the model {s.n_experts} experts, top-{s.top_k}"
        query = "SELECT 1 FROM routing WHERE run_id = ? AND layer = ? AND block = ? LIMIT 1"
        if not run.store.fetch(query, [run.run_id, place.layer, edit.block]):
            return f"the run {edit.run!r} has no decisions there: record it with the probe `routing`"
        return None

    def fill(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Nothing but positions and strengths."""

    def begin(self, sequences: tuple[int, ...]) -> None:
        """Fetch the recorded decisions of the rows to come."""
        s = self.place.sublayer
        assert s is not None
        if self.trace is not None and self.trace.sequences == sequences:
            return
        store: StoredRouting = stored_routing(self.place.sources, self.named.run)
        laid = store.at(sequences, s.layer, s.block, s.top_k or 1)
        if self.named.weights == "recorded" and bool(np.isnan(laid.weights[laid.known]).any()):
            raise InputError(
                f"run {self.named.run!r} has experts without weights", fix="use SetRouting(..., weights='own')"
            )
        arrays = laid.ids, laid.weights, laid.known, laid.tokens
        on_device = (torch.from_numpy(a).to(self.device) for a in arrays)
        self.trace = _Trace(sequences, *on_device)

    def fault(self) -> str | None:
        """Other texts ran than those that were recorded."""
        if self.other_text is None or not bool(self.other_text):
            return None
        return f"SetRouting: the texts that ran are not those of run {self.named.run!r} (their tokens differ)"

    def decide(self, decision: Decision, now: Now) -> None:
        """The recorded experts, in the model's own slots where they are the same."""
        trace, ids, weights = self.trace, decision.ids, decision.weights
        if trace is None or trace.sequences != now.sequences:
            raise RunError(
                "SetRouting does not know which texts are running",
                expected="the ids of the sequences in the batch, as in the run",
                fix="call session.begin([...]) before the pass",
            )
        if len(trace.ids) != len(now.ids):
            raise RunError(
                "the rows of this pass are not the sequences that were announced",
                expected=f"{len(trace.ids)} rows",
                found=f"{len(now.ids)}",
                fix="call session.begin([...]) with one sequence a row",
            )
        k, last = ids.shape[1], trace.known.shape[1] - 1
        position = now.position.to(self.device)
        place = position.clamp(0, last)
        known = (trace.known.gather(1, place) & (position <= last)).reshape(-1)
        here = (known & (self.amount(now) > 0))[:, None]
        recorded = trace.tokens.gather(1, place)
        other = (here[:, 0] & ((recorded != now.ids.to(self.device)) & (recorded >= 0)).reshape(-1)).any()
        self.other_text = other if self.other_text is None else self.other_text | other
        at = place[..., None].expand(-1, -1, trace.ids.shape[-1])
        given, shares = (_wide(t.gather(1, at).reshape(len(ids), -1), k) for t in (trace.ids, trace.weights))
        same = (given.sort(-1).values == ids.sort(-1).values).all(-1, keepdim=True)
        match = ids[:, :, None] == given[:, None, :]
        shares_own = (match * shares[:, None, :]).sum(-1)  # recorded weights in the slots that the token has
        given = torch.where(same, ids, given)
        if self.named.weights == "own":
            rule = self.place.rule
            assert rule is not None
            assert decision.logits is not None
            found = torch.where(same, weights.float(), rule.weights(decision.logits, given).float())
        else:
            found = torch.where(same, shares_own, shares)
        found = found.to(weights.dtype)
        found = torch.where(found.float() == weights.float(), weights, found)
        decision.ids = torch.where(here, given.to(ids.dtype), ids)
        decision.weights = torch.where(here, found, weights)


def _wide(values: torch.Tensor, k: int) -> torch.Tensor:
    missing = k - values.shape[1]
    return torch.cat([values, values[:, :1].expand(-1, missing) * 0], 1) if missing > 0 else values
