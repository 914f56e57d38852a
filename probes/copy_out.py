"""From the device to the host, in the background: the model's stream never waits for a copy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.probes.probe import Arrays, Tensors

Key = TypeVar("Key")


class CopyOut:
    """Copies small tensors to the host; on CUDA through pinned memory on a stream of its own.

    `begin` returns at once with a function that waits for the copies and gives arrays; call it on another thread.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    def begin(self, kept: Mapping[Key, Tensors]) -> Callable[[], dict[Key, Arrays]]:
        """Start copying what was kept at each key."""
        copies = {key: {name: self._copy(tensor) for name, tensor in tensors.items()} for key, tensors in kept.items()}
        events = [stream.record_event() for stream in self._streams.values()]

        def finish() -> dict[Key, Arrays]:
            for event in events:
                event.synchronize()
            return {key: {name: array(tensor) for name, tensor in tensors.items()} for key, tensors in copies.items()}

        return finish

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()
        if tensor.device.type != "cuda":
            return tensor.cpu()
        if tensor.device not in self._streams:
            make_stream: Any = torch.cuda.Stream
            self._streams[tensor.device] = make_stream(tensor.device)
        stream = self._streams[tensor.device]
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)
        return host


def array(tensor: torch.Tensor) -> NDArray[np.generic]:
    """A host tensor as an array sharing its memory."""
    found: NDArray[np.generic] = tensor.numpy()
    return found
