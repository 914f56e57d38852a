"""One forward pass over one batch, plain or under taps; the same call in both cases."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import nn

from moescope.probes.batches import Batch, Side
from moescope.probes.live_model import LiveModel


@dataclass(frozen=True)
class DeviceBatch:
    """A batch on the device that the model's inputs go to.

    Attributes:
        ids: token ids, padded.
        mask: real tokens.
        positions: place of each token in its sequence, 0 at padding; None where counting columns gives the same.
    """

    ids: Int[torch.Tensor, "row position"]
    mask: Bool[torch.Tensor, "row position"]
    positions: Int[torch.Tensor, "row position"] | None = None


def to_device(batch: Batch, model: LiveModel, *, side: Side = "right") -> DeviceBatch:
    """Pad a batch at one side and put it on the model's device, without waiting for the device.

    Padding at the left moves real tokens to later columns, so their positions go along.
    """
    ids, mask = (torch.from_numpy(a) for a in batch.padded(model.pad_id, side=side))
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0) if side == "left" and not bool(mask.all()) else None
    placed = [None if t is None else _sent(t, model.device) for t in (ids, mask, positions)]
    return DeviceBatch(*placed)  # type: ignore[arg-type]  # only the last may be None


def logits_of(model: LiveModel, batch: DeviceBatch) -> Float[torch.Tensor, "row position vocabulary"]:
    """Run the model as it is, without a cache, and give its logits."""
    return logits_in(model.module(**inputs_of(model, batch), **_if_taken(model, {"use_cache": False})))


def inputs_of(model: LiveModel, batch: DeviceBatch) -> dict[str, torch.Tensor]:
    """A batch as arguments of the model's `forward`; an encoder-decoder model reads the same text on both sides."""
    mask = batch.mask.long()
    found = {"input_ids": batch.ids, **_if_taken(model, {"attention_mask": mask})}
    if batch.positions is not None and "position_ids" in named_arguments(model.module):
        found["position_ids"] = batch.positions
    if is_encoder_decoder(model.module):
        found |= {"decoder_input_ids": batch.ids, "decoder_attention_mask": mask}
    return found


def logits_in(output: Any) -> torch.Tensor:
    """The logits in what a model gave: an output with `logits`, a tuple that begins with them, or the tensor itself."""
    found = getattr(output, "logits", output)
    logits: torch.Tensor = found[0] if isinstance(found, tuple) else found
    return logits


def is_encoder_decoder(module: nn.Module) -> bool:
    """Whether the model has an encoder of its own."""
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def named_arguments(module: nn.Module) -> frozenset[str]:
    """Names of the arguments that a module's `forward` lists."""
    return frozenset(inspect.signature(module.forward).parameters)


def time_plain(model: LiveModel, batches: Iterable[Batch], *, side: Side = "right") -> float:
    """Seconds of plain forward passes over batches, nothing else counted: no tokenising, taps, losses or records."""
    seconds = 0.0
    with torch.no_grad():
        for batch in batches:
            on_device = to_device(batch, model, side=side)
            _wait_for(model.device)
            started = time.perf_counter()
            logits_of(model, on_device)
            _wait_for(model.device)
            seconds += time.perf_counter() - started
    return seconds


def _if_taken(model: LiveModel, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those arguments that the model takes, by name or among any others."""
    parameters = inspect.signature(model.module.forward).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {name: value for name, value in arguments.items() if takes_any or name in parameters}


def _sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    # From pageable memory CUDA would first wait for everything queued before.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
