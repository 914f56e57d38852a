"""Attention under steering: how far every head's pattern moves, in Jensen-Shannon divergence, beside matched controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.core.statistics import bootstrap_ratio
from moescope.probes.attention_pattern import patterns_tapped
from moescope.probes.batches import Batch, BatchPlan
from moescope.probes.corpus import Corpus
from moescope.probes.edits.session import edited
from moescope.probes.forward import logits_of, to_device
from moescope.probes.live_model import LiveModel

Pattern = Float[torch.Tensor, "row head query key"]


@dataclass(frozen=True)
class AttentionShift:
    """How far patterns move.

    Attributes:
        layers: [layer] which layers have attention.
        value, ci_low, ci_high: [layer, head] mean Jensen-Shannon divergence over queries, nats (0 to ln 2), and an interval of
            95 % over documents.
        controls: [control, layer, head] the same under each control.
        queries: tokens behind it.
    """

    layers: tuple[int, ...]
    value: Float[NDArray[np.floating], "layer head"]
    ci_low: Float[NDArray[np.floating], "layer head"]
    ci_high: Float[NDArray[np.floating], "layer head"]
    controls: Float[NDArray[np.floating], "control layer head"]
    queries: int


@torch.no_grad()
def attention_shift(
    model: LiveModel,
    intervention: Intervention,
    corpus: Any,
    *,
    controls: Sequence[Intervention] = (),
    layers: Sequence[int] | None = None,
    sources: Mapping[str, Any] | None = None,
    batch_size: int = 4,
    max_length: int = 128,
    seed: int = 0,
) -> AttentionShift:
    """Jensen-Shannon divergence between each head's attention with and without an intervention, over the same tokens.

    JSD(A′, A) = ½ KL(A′ ‖ M) + ½ KL(A ‖ M) with M their mean, for every query over the keys it sees (arXiv 2502.18644 moves
    queries, and with them attention).

    Args:
        model: from `moescope.load`.
        intervention: what steers.
        corpus: a `Corpus`, or anything `Corpus.load` takes.
        controls: interventions to compare with, `moescope.probes.effects.controls.controls_for(…).interventions`, say.
        layers: those looked at; None for all with attention.
        sources: name → autoencoder.
        batch_size, max_length: of the passes; patterns grow with the square of the length.
        seed: of the resampling.

    Raises:
        InputError: a model without readable attention in these layers, or edits that it cannot take.
    """
    wanted = [s for s in model.anatomy.sublayers if s.kind == "attention" and s.block == "attn"]
    wanted = [s for s in wanted if layers is None or s.layer in layers]
    if not wanted:
        raise InputError(f"{model.name} has no attention in layers {layers}", expected="layers with attention")
    modules = {s.layer: model.module.get_submodule(s.path) for s in wanted}
    variants = [Intervention(), intervention, *controls]
    plan = BatchPlan(
        Corpus.load(corpus), model.tokenizer, batch_size, min(max_length, model.context or max_length),
        model.anatomy.vocabulary,
    )  # fmt: skip
    sums: list[NDArray[np.float64]] = []
    n: list[NDArray[np.float64]] = []
    document: list[int] = []
    with edited(model, variants, sources=sources) as session:
        for batch in plan:
            run = _Run(model, batch, modules)
            session.begin([s.sequence_id for s in batch.sequences])
            session.assign([0] * len(batch.sequences))
            plain = run.patterns()
            moved = []
            for number in range(1, len(variants)):
                session.assign([number] * len(batch.sequences))
                moved.append(run.shift(plain, run.patterns()))
            sums.append(np.stack(moved, 1))
            n.append(run.mask.sum(1).cpu().numpy().astype(np.float64))
            document += [s.document_id for s in batch.sequences]
    total, tokens = _by_document(np.concatenate(sums), np.concatenate(n), np.array(document))
    value, low, high = bootstrap_ratio(total, tokens[:, None, None, None], seed=seed)
    return AttentionShift(tuple(modules), value[0], low[0], high[0], value[1:], int(tokens.sum()))


class _Run:
    """One batch, run as often as is asked for."""

    def __init__(self, model: LiveModel, batch: Batch, modules: Mapping[int, torch.nn.Module]) -> None:
        self.model, self.modules = model, modules
        self.batch = to_device(batch, model)
        self.mask = self.batch.mask

    def patterns(self) -> dict[int, Pattern]:
        """Layer → attention of a pass."""
        found: dict[int, Pattern] = {}

        def keep(layer: int) -> Callable[[Pattern], None]:
            return lambda pattern: found.__setitem__(layer, pattern.float())

        with ExitStack() as stack:
            stack.enter_context(patterns_tapped([(module, keep(layer)) for layer, module in self.modules.items()]))
            logits_of(self.model, self.batch)
        return found

    def shift(self, plain: Mapping[int, Pattern], moved: Mapping[int, Pattern]) -> NDArray[np.float64]:
        """[row, layer, head] divergence summed over the row's queries."""
        counts = self.mask[:, None, :].double()
        sums = [(divergence(plain[layer], moved[layer]).double() * counts).sum(-1) for layer in self.modules]
        found: NDArray[np.float64] = torch.stack(sums, 1).cpu().numpy()
        return found


def divergence(first: Pattern, second: Pattern) -> Float[torch.Tensor, "row head query"]:
    """Jensen-Shannon divergence over keys, nats; keys that neither attends to add nothing.

    Example:
        >>> one = torch.tensor([[[[1.0, 0.0]]]])
        >>> [round(float(divergence(one, other)), 4) for other in (one, one.flip(-1))]
        [0.0, 0.6931]
    """
    middle = (first + second) / 2
    parts = [
        torch.where(p > 0, p * (p / torch.where(middle > 0, middle, 1.0)).clamp(min=1e-30).log(), 0.0)
        for p in (first, second)
    ]
    return ((parts[0] + parts[1]).sum(-1) / 2).clamp(min=0)


def _by_document(
    sums: NDArray[np.float64], n: NDArray[np.float64], document: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    _, place = np.unique(document, return_inverse=True)
    total, tokens = np.zeros((int(place.max()) + 1, *sums.shape[1:])), np.zeros(int(place.max()) + 1)
    np.add.at(total, place, sums)
    np.add.at(tokens, place, n)
    return total, tokens
