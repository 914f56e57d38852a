"""All experts at once, to first order: one forward and one backward pass a batch.

With s a factor on the weight of one (token, slot) pair, taking that slot out moves the loss by about −∂NLL/∂s at s = 1, which
is −gradient · (weight · output), the gradient being that of the loss at the experts' output.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import nn

from moescope.core.edit_kinds.experts import How
from moescope.core.errors import InputError, RunError
from moescope.probes.anatomy import Sublayer
from moescope.probes.batches import Batch
from moescope.probes.forward import DeviceBatch, logits_of, to_device
from moescope.probes.live_model import LiveModel

Router = tuple[int, str]


@dataclass(frozen=True)
class Screened:
    """First-order estimates of taking out each expert.

    Attributes:
        sequence, document: [sequence] ids.
        n: [sequence] predicted tokens.
        estimates: router → [expert, sequence] estimated change of the NLL, summed over the predicted tokens, nats.
        chosen: router → [expert, sequence] tokens that took the expert.
    """

    sequence: NDArray[np.int64]
    document: NDArray[np.int64]
    n: NDArray[np.int64]
    estimates: dict[Router, NDArray[np.float64]]
    chosen: dict[Router, NDArray[np.int64]]


def screen(
    model: LiveModel, batches: Iterable[Batch], *, how: How = "zero", layers: Iterable[int] | None = None
) -> Screened:
    """Estimate the effect of every expert alone on the NLL.

    With `zero`, what the estimate is the derivative of. With `renormalise`, the other slots of the token grow at the same
    time, by the share that leaves their sum of weights as it was; `route_around` is screened as `renormalise`, since what
    the next expert would have put out is not computed, `mean` and `copy` as `zero`.

    Args:
        model: whose routed experts are given ids and weights.
        batches: right-padded.
        how: how an expert is taken out.
        layers: of the routers; all where left out.

    Raises:
        InputError: experts that are not given their weights.
        RunError: a gradient that is no number, or that cannot be had.

    Example:
        >>> import moescope as ms
        >>> from moescope.probes.batches import BatchPlan
        >>> model = ms.load("demo")
        >>> plan = BatchPlan(ms.Corpus.load(["Hello world."]), model.tokenizer, 1, 64)
        >>> screen(model, plan).estimates[0, "mlp"].shape
        (16, 1)
    """
    wanted = None if layers is None else set(layers)
    routers = [s for s in model.anatomy.moe if wanted is None or s.layer in wanted]
    for s in routers:
        _check(s)
    with _frozen(model.module):
        parts = [(batch, _of_batch(model, routers, batch, how)) for batch in batches]
    if not parts:
        raise InputError("the corpus is empty")
    sequences = [s for batch, _ in parts for s in batch.sequences]
    places = [(s.layer, s.block) for s in routers]
    return Screened(
        np.array([s.sequence_id for s in sequences]),
        np.array([s.document_id for s in sequences]),
        np.array([max(0, len(s.token_ids) - 1) for s in sequences]),
        {place: np.concatenate([found[i][0] for _, found in parts], -1) for i, place in enumerate(places)},
        {place: np.concatenate([found[i][1] for _, found in parts], -1) for i, place in enumerate(places)},
    )


def _of_batch(
    model: LiveModel, routers: Sequence[Sublayer], batch: Batch, how: How
) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    on_device = to_device(batch, model)
    slots: dict[Router, _Slots] = {}
    with ExitStack() as stack, torch.enable_grad():
        for s in routers:
            slots[s.layer, s.block] = found = _Slots()
            experts = model.module.get_submodule(s.experts_path or "")
            stack.callback(experts.register_forward_pre_hook(found.scaled, with_kwargs=True).remove)
        loss = _loss(logits_of(model, on_device), on_device)
        scales = [found.scale for found in slots.values() if found.scale is not None]
        if len(scales) < len(slots):
            raise RunError("the experts of a layer did not run, or not in this thread")
        try:
            gradients = torch.autograd.grad(loss, scales)
        except RuntimeError as failed:
            raise RunError(
                "this model gives no gradient of its loss at the experts' weights",
                found=str(failed).split("\n", 1)[0],
                fix="run the exact sweep (without screening)",
            ) from failed
    lengths = batch.lengths
    result = []
    for s, gradient in zip(routers, gradients, strict=True):
        taken = slots[s.layer, s.block]
        assert taken.ids is not None
        assert taken.weights is not None
        moved = _moved(gradient.double(), taken.weights.double(), how)
        result.append(_by_expert(moved, taken.ids, s.n_experts or 0, len(lengths), on_device))
    return result


def _moved(
    gradient: Float[torch.Tensor, "token k"], weights: Float[torch.Tensor, "token k"], how: How
) -> Float[torch.Tensor, "token k"]:
    """First-order change of the loss where one slot is taken out; `gradient` is by the factor on each slot's weight."""
    if how not in ("renormalise", "route_around"):
        return -gradient
    left = weights.sum(-1, keepdim=True) - weights
    others = gradient.sum(-1, keepdim=True) - gradient
    growth = torch.where(left > 0, weights / torch.where(left > 0, left, 1), 0)
    return others * growth - gradient


def _by_expert(
    moved: Float[torch.Tensor, "token k"],
    ids: Int[torch.Tensor, "token k"],
    n_experts: int,
    rows: int,
    batch: DeviceBatch,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """[expert, row] Sums over slots, and tokens that took the expert; padding and slots that went to no expert left out."""
    real = batch.mask.to(ids.device).flatten().unsqueeze(-1) & (ids < n_experts)
    row = torch.arange(rows, device=ids.device).repeat_interleave(len(ids) // rows).unsqueeze(-1)
    place = torch.where(real, ids * rows + row, n_experts * rows)
    total = torch.zeros(n_experts * rows + 1, dtype=torch.float64, device=ids.device)
    count = torch.zeros_like(total, dtype=torch.int64)
    total.index_add_(0, place.flatten(), torch.where(real, moved, 0).flatten())
    count.index_add_(0, place.flatten(), torch.ones_like(place.flatten()))
    found = total[:-1].reshape(n_experts, rows).cpu().numpy()
    if not np.isfinite(found).all():
        raise RunError("a gradient is no number", fix="load the model in another dtype (float32, bfloat16)")
    return found, count[:-1].reshape(n_experts, rows).cpu().numpy()


def _loss(logits: Float[torch.Tensor, "row position vocabulary"], batch: DeviceBatch) -> torch.Tensor:
    """NLL of all predicted tokens, summed, a few rows in float32 at a time."""
    total = torch.zeros((), device=logits.device)
    following = batch.ids[:, 1:].masked_fill(~batch.mask[:, 1:], -100).to(logits.device)
    for row, targets in zip(logits[:, :-1], following, strict=True):
        total = total + F.cross_entropy(row.float(), targets, reduction="sum", ignore_index=-100)
    return total


class _Slots:
    """The decision of one router in the pass that runs, with a factor of one on every weight."""

    def __init__(self) -> None:
        self.ids: torch.Tensor | None = None
        self.weights: torch.Tensor | None = None
        self.scale: torch.Tensor | None = None

    def scaled(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The experts' arguments with factors on the weights."""
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        given = dict(zip(names, inputs, strict=False)) | named
        ids, weights = names[1], names[2]
        self.ids, self.weights = given[ids].detach(), given[weights].detach()
        self.scale = torch.ones_like(self.weights, requires_grad=True)
        given[weights] = given[weights] * self.scale
        return tuple(given.pop(name) for name in names[: len(inputs)]), given


def _check(s: Sublayer) -> None:
    if s.reader != "experts" or s.experts_path is None:
        raise InputError(
            f"layer {s.layer} ({s.block}) cannot be screened",
            found="experts that are not given ids and weights of the tokens",
            fix="run the exact sweep (without screening)",
        )


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No gradient for parameters, so that a backward pass keeps and computes only what the slots need."""
    wanted = [p for p in module.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
