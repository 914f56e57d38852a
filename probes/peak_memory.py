"""How much memory a piece of work takes at its peak, and how much there is."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_GROUP = Path("/sys/fs/cgroup")


@dataclass
class Peak:
    """Memory of a piece of work; bytes.

    Attributes:
        before: resident size of this process when it began.
        host: largest resident size while it ran.
        device: most that was allocated on CUDA devices, all of them together; 0 without one.
    """

    before: int
    host: int = 0
    device: int = 0

    @property
    def added(self) -> int:
        """What the work took over what was there, on the host."""
        return max(0, self.host - self.before)


@contextmanager
def watched(devices: Iterable[torch.device]) -> Iterator[Peak]:
    """Watch this process and some devices while the context lasts; the numbers stand once it is left.

    Where the operating system cannot forget an earlier peak (other than on Linux), `host` is the largest there ever was.
    """
    cuda = [device for device in devices if device.type == "cuda"]
    for device in cuda:
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        _RESET.write_text("5")
    peak = Peak(resident())
    try:
        yield peak
    finally:
        peak.host = max(_read(_STATUS, "VmHWM:") or _largest_ever(), peak.before)
        peak.device = sum(torch.cuda.max_memory_allocated(device) for device in cuda)


def resident() -> int:
    """Bytes of this process in memory."""
    return _read(_STATUS, "VmRSS:") or _largest_ever()


def free_host() -> int | None:
    """Bytes that this process may still take: of the machine, or of its control group where that has less; None if unknown."""
    found = [_read(Path("/proc/meminfo"), "MemAvailable:")]
    with suppress(OSError, ValueError):
        most = int((_GROUP / "memory.max").read_text())
        found.append(most - int((_GROUP / "memory.current").read_text()))
    known = [n for n in found if n is not None]
    return min(known) if known else None


def free_device(devices: Iterable[torch.device]) -> int | None:
    """Bytes free on CUDA devices, those that torch holds in reserve included; None without such a device."""
    cuda = [device for device in devices if device.type == "cuda"]
    if not cuda:
        return None
    return sum(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) for device in cuda)


def _read(path: Path, name: str) -> int | None:
    with suppress(OSError):
        for line in path.read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return None


def _largest_ever() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
