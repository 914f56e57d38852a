"""Where vectors that are no part of the stream pass a module: an MLP's neurons and its input, queries and head outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Int
from torch import nn

from moescope.core.sites import DENSE_POST, HEAD_Q, HEAD_Z, MLP_IN, Site
from moescope.probes.anatomy import Anatomy
from moescope.probes.block_outputs import contributions
from moescope.probes.edits.now import Now
from moescope.probes.head_vectors import head_vectors
from moescope.probes.mlp_inputs import mlp_inputs
from moescope.probes.projections import down_projection, widths

NEURONS = f"mlp.{DENSE_POST}"
MLP_INPUT = f"mlp.{MLP_IN}"
QUERIES, HEADS = f"attn.{HEAD_Q}", f"attn.{HEAD_Z}"
PASSAGES = (NEURONS, MLP_INPUT, QUERIES, HEADS)


@dataclass(frozen=True)
class Passage:
    """A module that vectors pass.

    Attributes:
        modules: whose input or output they are; several are given the same.
        side: which of the two.
        width: components of a vector.
        index: which components of the module's own vector they are, in their order; None for all as they lie.
    """

    modules: tuple[nn.Module, ...]
    side: Literal["in", "out"]
    width: int
    index: Int[torch.Tensor, " component"] | None = None


def passage_at(model: nn.Module, anatomy: Anatomy, layer: int, site: str) -> Passage | None:
    """Where the vectors of a site pass in a layer; None where they pass no module that can be told."""
    return _FINDERS[site](model, anatomy, layer)


def _neurons(model: nn.Module, anatomy: Anatomy, layer: int) -> Passage | None:
    paths = (s.path for s in anatomy.sublayers if (s.layer, s.block, s.kind) == (layer, "mlp", "dense"))
    end = next((down_projection(model, path, anatomy.d_model) for path in paths), None)
    size = None if end is None else widths(end)
    return None if end is None or size is None else Passage((end,), "in", size[0])


def _mlp_input(model: nn.Module, anatomy: Anatomy, layer: int) -> Passage | None:
    """The module that is read there, and shared experts that lie beside it and are given the same."""
    module = mlp_inputs(model, anatomy).get(Site(layer, "mlp", MLP_IN))
    if module is None:
        return None
    sums = (c.modules for c in contributions(model, anatomy, layer).values())
    return Passage(next((found for found in sums if module in found), (module,)), "in", anatomy.d_model)


def _queries(model: nn.Module, anatomy: Anatomy, layer: int) -> Passage | None:
    return _of_heads(model, anatomy, layer, HEAD_Q)


def _heads(model: nn.Module, anatomy: Anatomy, layer: int) -> Passage | None:
    return _of_heads(model, anatomy, layer, HEAD_Z)


def _of_heads(model: nn.Module, anatomy: Anatomy, layer: int, tensor: str) -> Passage | None:
    paths = (s.path for s in anatomy.sublayers if (s.layer, s.block, s.kind) == (layer, "attn", "attention"))
    path = next(paths, None)
    reading = None if path is None else head_vectors(model.get_submodule(path), anatomy.d_model).get(tensor)
    size = None if reading is None else widths(reading.module)
    if reading is None or size is None or reading.cached:
        return None
    whole = size[0] if reading.side == "in" else size[1]
    index = reading.split(torch.arange(whole)[None, None]).flatten()
    own = len(index) == whole and bool((index == torch.arange(whole)).all())
    return Passage((reading.module,), reading.side, len(index), None if own else index)


_FINDERS: dict[str, Callable[[nn.Module, Anatomy, int], Passage | None]] = {
    NEURONS: _neurons,
    MLP_INPUT: _mlp_input,
    QUERIES: _queries,
    HEADS: _heads,
}


class Session(Protocol):
    """What a hook asks of a session of edits."""

    @property
    def now(self) -> Now | None:
        """The pass that runs; None for one that is not edited."""


class Changing(Protocol):
    """A step, as far as a hook needs it."""

    def change(self, given: torch.Tensor, now: Now) -> torch.Tensor:
        """The vectors as they go on."""


def passage_hooks(passage: Passage, session: Session, steps: Sequence[Changing]) -> list[Any]:
    """Put steps where vectors pass; hooks of ours run before any that taps put on."""

    def changed(given: torch.Tensor, now: Now) -> torch.Tensor:
        whole = given if given.ndim == 3 else given.reshape(*now.mask.shape, given.shape[-1])
        index = None if passage.index is None else passage.index.to(whole.device)
        vectors = whole if index is None else whole.index_select(-1, index)
        for step in steps:
            vectors = step.change(vectors, now)
        return (vectors if index is None else whole.index_copy(-1, index, vectors)).reshape(given.shape)

    def before(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        now = session.now
        if now is None:
            return None
        name = "hidden_states" if not inputs and "hidden_states" in named else next(iter(named), "")
        found = changed(inputs[0] if inputs else named[name], now)
        return ((found, *inputs[1:]), named) if inputs else (inputs, {**named, name: found})

    def after(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        now = session.now
        return None if now is None else changed(output, now)

    if passage.side == "in":
        return [m.register_forward_pre_hook(before, with_kwargs=True, prepend=True) for m in passage.modules]
    return [m.register_forward_hook(after, prepend=True) for m in passage.modules]
