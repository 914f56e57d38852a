"""Passes with and without edits over the same batches, compared token by token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.core.errors import RunError
from moescope.core.intervention import Intervention
from moescope.probes.batches import Batch
from moescope.probes.effects.token_numbers import TokenNumbers, compared
from moescope.probes.effects.variants import Under, alternately
from moescope.probes.forward import logits_of, to_device
from moescope.probes.live_model import LiveModel

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PairedBatch:
    """A batch that ran without edits and under each of some interventions, on the host.

    Every number is about a predicted token: a real one that is not the first of its sequence. Elsewhere it is 0.

    Attributes:
        batch: its sequences, padded at the right.
        ids: [row, position] token ids.
        predicted: [row, position] whether the token was predicted.
        base_nll: [row, position] NLL without edits, nats.
        delta_nll: [variant, row, position] NLL under the edit less that without, nats.
        kl: [variant, row, position] KL(unedited ‖ edited) of the distribution over that token, nats.
        flips: [variant, row, position] 1 where the most likely token there is another, else 0.
    """

    batch: Batch
    ids: NDArray[np.int64]
    predicted: NDArray[np.bool_]
    base_nll: Floats
    delta_nll: Floats
    kl: Floats
    flips: Floats


def paired_pass(
    model: LiveModel,
    batches: Iterable[Batch],
    variants: Sequence[Intervention],
    *,
    sources: Mapping[str, Any] | None = None,
) -> Iterator[PairedBatch]:
    """Run each batch plain, then under each variant, and compare the predictions.

    All passes of a batch have the same shape, so that an edit that changes nothing gives exactly 0. Of the logits, those of
    the plain pass and of one variant are held at a time. Edits hold from the first batch until the iterator ends or is closed.

    Args:
        model: what runs.
        batches: a `BatchPlan`, or some of its batches.
        variants: what to compare with the plain pass.
        sources: name → run or autoencoder, for edits that name one.

    Raises:
        InputError: an edit that this model cannot take.
        RunError: logits that are no numbers, with or without an edit; an edit that makes possible tokens impossible.
    """
    with alternately(model, variants, sources=sources) as under:
        for batch in batches:
            with torch.no_grad():
                paired = _paired(model, under, batch, variants)
            yield paired


def _paired(model: LiveModel, under: Under, batch: Batch, variants: Sequence[Intervention]) -> PairedBatch:
    on_device = to_device(batch, model)
    spans = batch.spans() if model.device.type == "cpu" else None
    sequences = [sequence.sequence_id for sequence in batch.sequences]
    with under(None, sequences):
        base = logits_of(model, on_device)
    numbers: list[TokenNumbers] = []
    for number in range(len(variants)):
        with under(number, sequences):
            changed = logits_of(model, on_device)
        numbers.append(compared(base, changed, on_device.ids, spans=spans))
        del changed  # before the next pass makes its own
    if not variants:
        numbers = [compared(base, base, on_device.ids, spans=spans)]
    ids, mask = batch.padded(model.pad_id)
    predicted = mask & (np.arange(mask.shape[1]) > 0)
    found = {name: np.stack([_on_host(n, name) for n in numbers]) for name in ("base_nll", "delta_nll", "kl", "flips")}
    found = {name: np.where(predicted, values, 0.0) for name, values in found.items()}
    _check(batch, found, variants)
    kept = len(variants)
    return PairedBatch(
        batch, ids, predicted, found["base_nll"][0], *(found[name][:kept] for name in ("delta_nll", "kl", "flips"))
    )


def _on_host(numbers: TokenNumbers, name: str) -> Floats:
    found: Floats = getattr(numbers, name).cpu().numpy()
    return found


def _check(batch: Batch, found: Mapping[str, Floats], variants: Sequence[Intervention]) -> None:
    """Raise `RunError` where a number is none."""
    if not np.isfinite(found["base_nll"]).all():
        raise RunError(
            "the model's logits are no numbers, without any edit",
            found=f"NaN or infinity in {_first_bad(batch, found['base_nll'][0])}",
            fix="load it in another dtype (float32, bfloat16)",
        )
    for number, variant in enumerate(variants):
        for name in ("delta_nll", "kl"):
            values = found[name][number]
            if not np.isfinite(values).all():
                raise RunError(
                    f"after the edit the model's predictions are no numbers ({called(variant, number)})",
                    found=f"NaN or infinity in {_first_bad(batch, values)}",
                    fix="take a smaller strength, or another dtype; nothing was stored",
                )


def _first_bad(batch: Batch, values: Floats) -> str:
    row, position = (int(i) for i in np.argwhere(~np.isfinite(values))[0])
    return f"sequence {batch.sequences[row].sequence_id:,}, position {position:,}"


def called(intervention: Intervention, number: int) -> str:
    """What to call an intervention in a message: its name, or its kinds of edits."""
    kinds = ", ".join(dict.fromkeys(edit.kind for edit in intervention.edits))
    return intervention.name or kinds or f"intervention {number}"
