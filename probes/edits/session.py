"""A session of edits on a live model: hooks and tables while the context lasts, nothing of them afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import nn

from moescope.core.errors import InputError, MoescopeError, RunError
from moescope.core.intervention import Intervention
from moescope.probes.anatomy import Anatomy
from moescope.probes.edits.attach_decisions import attach_decisions
from moescope.probes.edits.checks import check_intervention
from moescope.probes.edits.compile import Column, Program, Spot, compiled, make_steps, refit
from moescope.probes.edits.now import Now
from moescope.probes.edits.passing import now_of
from moescope.probes.edits.places import place_of
from moescope.probes.edits.router_rules import EDITED
from moescope.probes.edits.step import Place, WeightStep
from moescope.probes.forward import is_encoder_decoder, logits_in
from moescope.probes.live_model import LiveModel

_entering = threading.Lock()


@contextmanager
def edited(
    model: LiveModel,
    interventions: Intervention | Sequence[Intervention],
    *,
    sources: Mapping[str, Any] | None = None,
) -> Iterator[Edited]:
    """Everything the model computes inside is edited; outside, nothing remains.

    Row i of a batch is under the intervention that `assign` gave it, under the first where nothing was assigned; an empty
    `Intervention()` leaves rows as they are. Taps (`moescope.probes.taps.tapped`), put on inside or outside, see what the
    edited model did. Passes of the thread that entered are edited, and no others.

    At a router, edits act in the order in which a router works, and where that is the same, in the order given: first those
    of its logits and its choice (Bias, MixRouting, Force, Keep, Ablate route_around, TopK, RankRouting), which its rule then
    decides upon once; then those of the chosen slots (SetRouting, RandomRouting, SwapExperts, TopP); then those of weights
    and outputs (Scale, Ablate in its other ways).

    Args:
        model: a loaded model.
        interventions: one, or several to be held side by side in one batch.
        sources: name → run (`moescope.Run`), for edits that replay what a run recorded.

    Raises:
        InputError: an edit that this model cannot take, conflicting edits, or a model that is being edited already: one
            session at a time, with everything in it.

    Example:
        >>> import torch, moescope as ms
        >>> from moescope.core.edit_kinds.experts import Ablate
        >>> model = ms.load("demo")
        >>> ids = torch.tensor([[5, 6, 7]])
        >>> with torch.no_grad(), edited(model, Intervention([Ablate(layer=3, experts=range(8))])):
        ...     cut = model.module(input_ids=ids).logits
        >>> with torch.no_grad():
        ...     bool(torch.equal(cut, model.module(input_ids=ids).logits))
        False
    """
    several = (interventions,) if isinstance(interventions, Intervention) else tuple(interventions)
    session = Edited(model, several, sources or {})
    with ExitStack() as stack:
        session._enter(stack)
        yield session


class Edited:
    """A session; made by `edited`.

    Attributes:
        module, anatomy: the edited model.
        interventions: those in force.
    """

    def __init__(self, model: LiveModel, interventions: tuple[Intervention, ...], sources: Mapping[str, Any]) -> None:
        if not interventions:
            raise InputError("a session needs at least one intervention", fix="pass Intervention() for none")
        if is_encoder_decoder(model.module):
            raise InputError(
                f"{model.name} cannot be edited",
                found="an encoder-decoder model, whose two stacks see different tokens",
            )
        self._model, self._sources = model, dict(sources)
        self.module: nn.Module = model.module
        self.anatomy: Anatomy = model.anatomy
        self.interventions = interventions
        for intervention in interventions:
            check_intervention(model, intervention, sources=self._sources)
        self._program: Program = compiled(interventions, model.anatomy)
        make_steps(self._program, self._place)
        self._row: Int[torch.Tensor, " row"] | None = None
        self._sequences: tuple[int, ...] | None = None
        self._thread = threading.get_ident()
        self._now: Now | None = None
        self._number = len(interventions)
        self._spoilt: torch.Tensor | None = None

    @property
    def now(self) -> Now | None:
        """The pass that runs; None outside of one, and in other threads."""
        return self._now if threading.get_ident() == self._thread else None

    def assign(self, rows: Sequence[int]) -> None:
        """Say which intervention each row of the following passes is under, until called again.

        Raises:
            InputError: a number without an intervention.
        """
        numbers = [int(row) for row in rows]
        if wrong := [n for n in numbers if not 0 <= n < self._number]:
            raise InputError(
                "there is no such intervention in this session",
                expected=f"numbers from 0 to {self._number - 1}",
                found=f"{wrong[0]}",
            )
        self._row = torch.tensor(numbers, dtype=torch.int64).to(self._model.device, non_blocking=True)

    def begin(self, sequence_ids: Sequence[int]) -> None:
        """Say which sequences the rows of the following passes are, for edits that replay a run; outside any pass."""
        asked, self._sequences = tuple(int(n) for n in sequence_ids), None
        for columns in self._program.spots.values():
            for column in columns:
                if column.step is not None:
                    column.step.begin(asked)
        self._sequences = asked

    def update(self, *interventions: Intervention) -> None:
        """Put other numbers into force: same kinds of edits at the same places, changed in the tables where they lie.

        Fewer interventions than before leave the last ones empty.

        Raises:
            InputError: edits of other kinds or places, or ones the model cannot take; everything stays as it was.
        """
        for intervention in interventions:
            check_intervention(self._model, intervention, sources=self._sources)
        before = self.interventions
        try:
            self._put(interventions)
        except MoescopeError:
            self._put(before)
            raise

    def check_finite(self) -> None:
        """Wait for the device, and say if any pass since the last check gave NaN or infinite logits, or ran other texts than
        those of a run that is replayed.

        Raises:
            RunError: with the interventions under which it happened.
        """
        for spot in self._program.spots:
            for step in self._program.steps(spot):
                if reason := step.fault():
                    raise RunError(reason)
        if self._spoilt is None:
            return
        counts = self._spoilt.tolist()
        self._spoilt = None
        if any(counts):
            which = [i for i, count in enumerate(counts) if count]
            names = [self.interventions[i].name or f"number {i}" for i in which if i < len(self.interventions)]
            raise RunError(
                "the edited model gave logits that are not finite",
                found=f"under intervention {', '.join(names)}: NaN or infinity in {sum(counts)} rows",
                fix="use a smaller strength or fewer edits",
            )

    def _put(self, interventions: tuple[Intervention, ...]) -> None:
        """Write interventions into the tables."""
        refit(self._program, interventions, self.anatomy, self._number)
        self.interventions = interventions
        for columns in self._program.spots.values():
            for column in columns:
                assert column.step is not None
                column.step.update(column.edits)
                if self._sequences is not None:
                    column.step.begin(self._sequences)

    def _place(self, spot: Spot, column: Column) -> Place:
        s = next((s for s in self.anatomy.sublayers if (s.layer, s.block) == (spot.layer, spot.block)), None)
        if spot.where in ("decision", "weights"):
            s = self.anatomy.moe_at(spot.layer, spot.block)
        asked = [e for item in column.edits if item for e in (item if isinstance(item, tuple) else (item,))]
        return place_of(self._model, spot, s, asked, self._sources)

    def _enter(self, stack: ExitStack) -> None:
        with _entering:
            if EDITED in vars(self.module):
                raise InputError(
                    "this model is already being edited",
                    found="a session of edits that has not ended",
                    fix="put all edits into one intervention, or end the first session before",
                )
            vars(self.module)[EDITED] = self
        stack.callback(vars(self.module).pop, EDITED, None)
        weights = [
            step for spot in self._program.spots for step in self._program.steps(spot) if isinstance(step, WeightStep)
        ]
        for step in weights:
            step.enter()
            stack.callback(step.leave)
        before = self.module.register_forward_pre_hook(self._arrive, with_kwargs=True, prepend=True)
        stack.callback(before.remove)
        after = self.module.register_forward_hook(self._left, always_call=True)
        stack.callback(after.remove)
        stack.callback(self._clear)
        self._attach(stack)

    def _attach(self, stack: ExitStack) -> None:
        for spot in self._program.spots:
            steps: Any = self._program.steps(spot)
            if spot.where == "decision":
                s = self.anatomy.moe_at(spot.layer, spot.block)
                assert s is not None
                attach_decisions(stack, self, s, steps)
            elif spot.where == "stream":
                from moescope.probes.edits.attach_stream import attach_stream

                attach_stream(stack, self, spot.layer, steps)
            elif spot.where == "heads":
                from moescope.probes.edits.attach_heads import attach_heads

                s = steps[0].place.sublayer
                assert s is not None
                attach_heads(stack, self, s, steps)

    def _arrive(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if threading.get_ident() == self._thread:
            self._now = now_of(module, inputs, named, self._row, self._sequences)

    def _left(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        now = self.now
        if now is None:
            return
        self._now = None
        if output is not None and self._program.spots:  # an exception gives none
            self._watch(logits_in(output), now)

    def _watch(self, logits: torch.Tensor, now: Now) -> None:
        """Count rows with a real token whose logits are not finite, by intervention, on the device."""
        if not isinstance(logits, torch.Tensor) or logits.ndim != 3:
            return
        finite = logits.sum(-1, dtype=torch.float32).isfinite()
        row = now.row.to(finite.device)
        bad = (~finite & now.mask[:, -finite.shape[1] :].to(finite.device)).any(-1).long()
        if self._spoilt is None:
            self._spoilt = torch.zeros(self._number, dtype=torch.int64, device=finite.device)
        self._spoilt = self._spoilt.index_add(0, row, bad)

    def _clear(self) -> None:
        self._now = None


def interventions_in_force(model: LiveModel) -> tuple[Intervention, ...]:
    """The interventions of the session that lasts on a model; none outside of any.

    Example:
        >>> import moescope as ms
        >>> interventions_in_force(ms.load("demo"))
        ()
    """
    session: Edited | None = vars(model.module).get(EDITED)
    return () if session is None else tuple(session.interventions)
