"""One forward pass over one batch, plain or under taps; the same call in both cases."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int

from moescope.probes.batches import Batch
from moescope.probes.live_model import LiveModel


@dataclass(frozen=True)
class DeviceBatch:
    """A batch on the model's device.

    Attributes:
        ids: token ids, padded at the right.
        mask: real tokens.
    """

    ids: Int[torch.Tensor, "row position"]
    mask: Bool[torch.Tensor, "row position"]


def to_device(batch: Batch, model: LiveModel) -> DeviceBatch:
    """Pad a batch and put it on the model's device."""
    ids, mask = batch.padded(model.pad_id)
    return DeviceBatch(torch.from_numpy(ids).to(model.device), torch.from_numpy(mask).to(model.device))


def logits_of(model: LiveModel, batch: DeviceBatch) -> Float[torch.Tensor, "row position vocabulary"]:
    """Run the model as it is and give its logits."""
    output = model.module(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False)
    logits: torch.Tensor = output.logits
    return logits


def time_plain(model: LiveModel, batches: Iterable[Batch]) -> float:
    """Seconds of plain forward passes over batches, nothing else counted: no tokenising, taps, losses or records."""
    seconds = 0.0
    with torch.no_grad():
        for batch in batches:
            on_device = to_device(batch, model)
            _wait_for(model.device)
            started = time.perf_counter()
            logits_of(model, on_device)
            _wait_for(model.device)
            seconds += time.perf_counter() - started
    return seconds


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
