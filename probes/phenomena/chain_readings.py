"""What a model does to some texts under each of several interventions: losses, largest activations, attention to first tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.core.errors import RunError
from moescope.core.sites import RESID_POST, Site
from moescope.probes.attention_reduced import attention_reduced, pattern_places
from moescope.probes.attention_slices import PatternSlices
from moescope.probes.batches import Batch
from moescope.probes.edits.session import Edited
from moescope.probes.effects.token_numbers import compared
from moescope.probes.forward import DeviceBatch, logits_of, to_device
from moescope.probes.live_model import LiveModel
from moescope.probes.taps import tapped

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Readings:
    """One variant of a model on some texts. Everything is by sequence.

    Attributes:
        sequence, document: [sequence] ids.
        tokens, predicted: [sequence] how many, and how many of them something predicted.
        nll, kl: [sequence] sums over predicted tokens, nats; kl is KL(unedited ‖ this).
        largest: [sequence, layer] the largest |x| after each block.
        massive: [sequence, layer] |x| after each block at the sequence's place and channel; 0 for sequences without one.
        sink: [sequence, head] sum over queries of the attention to the first token; heads of all layers in a row.
        head_layer: [head] layer of each.
    """

    sequence: NDArray[np.int64]
    document: NDArray[np.int64]
    tokens: NDArray[np.int64]
    predicted: NDArray[np.int64]
    nll: Floats
    kl: Floats
    largest: Floats
    massive: Floats
    sink: Floats
    head_layer: NDArray[np.int64]


def read_variants(
    model: LiveModel,
    session: Edited,
    batches: Sequence[Batch],
    variants: int,
    *,
    places: Mapping[int, int],
    channel: int,
    tell: Callable[[], None] = lambda: None,
) -> list[Readings]:
    """Run every batch under each of the session's first `variants` interventions, the first of which is none.

    Args:
        model: under edits.
        session: its session.
        batches: the texts, padded at the right.
        variants: how many interventions.
        places: sequence → position of its massive activation.
        channel: of these.
        tell: called after each pass.

    Raises:
        RunError: logits that are no numbers.
    """
    streamed = [] if model.anatomy.no_stream else [Site(n, "", RESID_POST) for n in range(model.anatomy.n_layers)]
    reader = _Reader(model, streamed, _patterned(model), places, channel)
    found: list[list[_BatchReadings]] = [[] for _ in range(variants)]
    with torch.no_grad():
        for batch in batches:
            given = to_device(batch, model)
            session.begin([s.sequence_id for s in batch.sequences])
            base = None
            for number in range(variants):
                session.assign([number] * len(given.ids))
                logits, seen = reader.run(batch, given)
                base = logits if base is None else base
                spans = batch.spans() if model.device.type == "cpu" else None
                numbers = compared(base, logits, given.ids, spans=spans)
                seen.nll = _summed(numbers.base_nll + numbers.delta_nll, given)
                seen.kl = _summed(numbers.kl, given)
                if not (np.isfinite(seen.nll).all() and np.isfinite(seen.kl).all()):
                    raise RunError(
                        "the model's logits are no numbers",
                        found=f"NaN or infinity under {session.interventions[number].name or 'no edit'}",
                        fix="load it in another dtype (float32, bfloat16), or cut something else",
                    )
                found[number].append(seen)
                tell()
    return [_joined(batches, parts, reader.head_layer) for parts in found]


class _BatchReadings:
    """What one pass showed."""

    def __init__(self, rows: int, layers: int) -> None:
        self.nll = self.kl = np.zeros(rows)
        self.largest, self.massive = np.zeros((rows, layers)), np.zeros((rows, layers))
        self.sink: dict[Site, Floats] = {}


class _Reader:
    """Taps of one pass."""

    def __init__(
        self, model: LiveModel, streamed: list[Site], patterned: list[Site], places: Mapping[int, int], channel: int
    ) -> None:
        self.model, self.streamed, self.patterned = model, streamed, patterned
        self.places, self.channel = places, channel
        self.head_layer = np.zeros(0, np.int64)

    def run(self, batch: Batch, given: DeviceBatch) -> tuple[torch.Tensor, _BatchReadings]:
        rows = len(given.ids)
        seen = _BatchReadings(rows, self.model.anatomy.n_layers)
        position = [self.places.get(s.sequence_id, -1) for s in batch.sequences]
        position = [p if p < given.ids.shape[1] else -1 for p in position]
        at = torch.tensor([max(p, 0) for p in position], device=given.ids.device)
        has = np.array([p >= 0 for p in position])
        kept: dict[Site, tuple[torch.Tensor, torch.Tensor]] = {}
        sinks: dict[Site, torch.Tensor] = {}

        def stream(site: Site, tensors: dict[str, torch.Tensor]) -> None:
            resid = tensors["resid"].detach()
            mask = given.mask.to(resid.device)[..., None]
            row = torch.arange(rows, device=resid.device)
            kept[site] = (
                resid.abs().masked_fill(~mask, 0.0).amax((1, 2)).float(),
                resid[row, at.to(resid.device), self.channel].abs().float(),
            )

        def pattern(site: Site, slices: PatternSlices) -> None:
            total = torch.zeros(rows, slices.heads, device=slices.device)
            mask = given.mask.to(slices.device)
            for part, first in slices:
                total += (part[..., 0] * mask[:, None, first : first + part.shape[2]]).sum(-1)
            sinks[site] = total

        with tapped(self.model.module, self.model.anatomy, self.streamed, stream):
            if self.patterned:
                with attention_reduced(self.model, [site.layer for site in self.patterned], pattern):
                    logits = logits_of(self.model, given)
            else:
                logits = logits_of(self.model, given)
        for site, (largest, massive) in kept.items():
            seen.largest[:, site.layer] = largest.cpu().numpy()
            seen.massive[:, site.layer] = np.where(has, massive.cpu().numpy(), 0.0)
        seen.sink = {site: total.double().cpu().numpy() for site, total in sorted(sinks.items())}
        self.head_layer = np.concatenate(
            [np.full(total.shape[1], site.layer) for site, total in seen.sink.items()] or [np.zeros(0, np.int64)]
        )
        return logits, seen


def _patterned(model: LiveModel) -> list[Site]:
    """Layers whose pattern can be read; none in a model without attention."""
    from moescope.core.errors import InputError

    try:
        return pattern_places(model)[0]
    except InputError:
        return []


def _summed(values: torch.Tensor, given: DeviceBatch) -> Floats:
    """Sum over the predicted tokens of each row."""
    predicted = given.mask.clone()
    predicted[:, 0] = False
    found: Floats = torch.where(predicted.to(values.device), values, 0.0).double().sum(1).cpu().numpy()
    return found


def _joined(batches: Sequence[Batch], parts: Sequence[_BatchReadings], head_layer: NDArray[np.int64]) -> Readings:
    sequences = [s for batch in batches for s in batch.sequences]
    tokens = np.array([len(s.token_ids) for s in sequences])
    sinks = [np.concatenate(list(p.sink.values()), 1) if p.sink else np.zeros((len(p.nll), 0)) for p in parts]
    return Readings(
        np.array([s.sequence_id for s in sequences]),
        np.array([s.document_id for s in sequences]),
        tokens,
        tokens - 1,
        np.concatenate([p.nll for p in parts]),
        np.concatenate([p.kl for p in parts]),
        np.concatenate([p.largest for p in parts]),
        np.concatenate([p.massive for p in parts]),
        np.concatenate(sinks),
        head_layer,
    )
