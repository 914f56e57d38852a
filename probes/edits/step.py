"""`Step`: one kind of edit, compiled for one place of a model and for every intervention of a session at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import nn

from moescope.core.edit import Edit
from moescope.core.registry import Registry
from moescope.probes.anatomy import Anatomy, Sublayer
from moescope.probes.edits.now import Now
from moescope.probes.routing_rule import BoundRule

E = TypeVar("E", bound=Edit)


@dataclass(frozen=True)
class Place:
    """Where a step acts.

    Attributes:
        model, anatomy: the module and what it is made of.
        layer: of the block.
        sublayer: the router's or attention's; None for edits of the stream.
        rule: verified rule of the router, where the step asked for one (`needs_rule`).
        sources: run name → its records, for edits that replay some.
    """

    model: nn.Module
    anatomy: Anatomy
    layer: int
    sublayer: Sublayer | None = None
    rule: BoundRule | None = None
    sources: dict[str, Any] = field(default_factory=dict)


class Step(ABC, Generic[E]):
    """One kind of edit at one place, for all interventions of a session: row i of every table belongs to intervention i.

    Tables live on the device of the place. `update` changes them in place; nothing in a forward pass reads them on the
    host. Rows whose intervention has no such edit, tokens outside its positions and strength 0 leave every bit as it was:
    results are chosen with `torch.where(amount > 0, changed, given)`, never by multiplying with 0 or 1.

    Args:
        edits: one an intervention; None where it has none here. All are of one class and one `form`.
        place: where.
    """

    needs_rule: ClassVar[bool] = False
    united: ClassVar[bool] = False  # whether `update` takes, for each intervention, a tuple of edits that act as one

    def __init__(self, edits: Sequence[E | None], place: Place) -> None:
        self.place = place
        self.update(edits)

    @staticmethod
    def form(edit: Any) -> Any:
        """What two edits must share to be one step (`how`, number of channels, …)."""
        return ()

    @staticmethod
    def why_not(edit: Any, place: Place) -> str | None:
        """Why this edit cannot be made at a place; None where it can."""
        del edit, place
        return None

    @classmethod
    def asks_rule(cls, edit: Any) -> bool | Literal["weights"]:
        """Whether this edit needs the router's verified rule; `weights` where only for the weights of given experts."""
        del edit
        return cls.needs_rule

    def begin(self, sequences: tuple[int, ...]) -> None:
        """Fetch what this step needs of the sequences that the next rows are; called outside the pass."""

    def fault(self) -> str | None:
        """What was wrong with the passes so far, read back after them; None for nothing."""
        return None

    @abstractmethod
    def update(self, edits: Sequence[E | None]) -> None:
        """Write the edits' numbers into the tables: made at the first call, changed in place at later ones."""


class DecisionStep(Step[E]):
    """Changes what the experts of a router are given.

    Attributes:
        phase: where in a router it acts: 0 on its logits and its choice, 1 on the slots chosen, 2 on their weights and outputs.
        graded: whether a strength other than 0 and 1 means something.
        after: whether it changes what the experts put out, when that is there.
        reads_logits: whether it needs the router's logits.
        live: whether any of its edits has a strength other than 0; a step that has none is not run.
    """

    phase: ClassVar[int] = 1
    graded: ClassVar[bool] = False
    after: ClassVar[bool] = False
    reads_logits: bool = False
    live: bool = True

    @abstractmethod
    def decide(self, decision: Decision, now: Now) -> None:
        """Change `decision` in place of its attributes."""

    def outputs(self, experts: nn.Module, decision: Decision, now: Now) -> torch.Tensor | None:
        """What is added to the output of the experts module, [token, d_model]; asked of steps that act `after` it."""
        del experts, decision, now
        return None


@dataclass
class Decision:
    """What the experts are about to be given; a step puts new tensors in.

    Attributes:
        hidden: what the experts read.
        ids, weights: the decision, slot by slot; k may change.
        logits: the router's, where a step needs the rule; edits of logits leave theirs here for later steps.
        added: vectors to be added to the experts' output; None for nothing.
    """

    hidden: Float[torch.Tensor, "token d_model"]
    ids: Int[torch.Tensor, "token k"]
    weights: Float[torch.Tensor, "token k"]
    logits: Float[torch.Tensor, "token n_experts"] | None = None
    added: Float[torch.Tensor, "token d_model"] | None = None


class StreamStep(Step[E]):
    """Changes a stream of vectors."""

    @abstractmethod
    def change(self, given: Float[torch.Tensor, "row position d_model"], now: Now) -> torch.Tensor:
        """The stream as it goes on."""


class HeadStep(Step[E]):
    """Changes attention heads: their queries before attention, or their outputs before the projection."""

    def queries(self, q: Float[torch.Tensor, "row head position d_head"], now: Now) -> torch.Tensor:
        """Queries as the kernel gets them."""
        return q

    def outputs(self, z: Float[torch.Tensor, "row position head d_head"], now: Now) -> torch.Tensor:
        """Head outputs as the projection gets them."""
        return z


class WeightStep(Step[E]):
    """Changes parameters for as long as the session lasts; cannot differ between rows of a batch."""

    @abstractmethod
    def enter(self) -> None:
        """Put the changed parameters in."""

    @abstractmethod
    def leave(self) -> None:
        """Put the model's own parameters back, the same objects."""


steps: Registry[type[Step[Any]]] = Registry("step", "moescope.probes.edits.steps")

S = TypeVar("S", bound=type[Step[Any]])


def step(*names: str) -> Callable[[S], S]:
    """Register the decorated class for kinds of edits: `add`, or `ablate:zero` for one `how` of a kind."""

    def register(cls: S) -> S:
        for name in names:
            steps.add(name, cls)
        return cls

    return register


def step_for(edit: Edit) -> type[Step[Any]]:
    """The class that applies an edit."""
    named = f"{edit.kind}:{getattr(edit, 'how', '')}"
    return steps[named if named in steps else edit.kind]
