"""What to keep of a recording so that it fits a budget of bytes on disk."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moescope.core.errors import InputError

VECTORS = "activations"
_ALWAYS = "tokens"
_LEAST_SAMPLE = 0.01  # below that share, leaving out another probe comes first
_UNITS = {unit: 1000**n for n, unit in enumerate(("B", "KB", "MB", "GB", "TB"))}
_UNITS |= {unit: 1024**n for n, unit in enumerate(("B", "KIB", "MIB", "GIB", "TIB"))}
_AMOUNT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)")

Size = Callable[[Sequence[str], float], int]


@dataclass(frozen=True)
class Choice:
    """What is kept: probes and the share of tokens whose vectors are, and in words what is lost by it."""

    probes: tuple[str, ...]
    sample: float
    lost: tuple[str, ...] = ()


def read_bytes(amount: str | int) -> int:
    """Bytes in words: KB, MB, GB and TB are powers of 1,000; KiB, MiB, GiB and TiB of 1,024.

    Raises:
        InputError: it is no such amount, or not even one byte.

    Example:
        >>> read_bytes("1.5GB"), read_bytes("2 KiB"), read_bytes(7)
        (1500000000, 2048, 7)
    """
    found = _AMOUNT.fullmatch(str(amount).strip())
    unit = _UNITS.get(found[2].upper() or "B") if found else None
    bytes_asked = float(found[1]) * unit if found and unit else 0.0
    size = int(bytes_asked) if math.isfinite(bytes_asked) else 0
    if isinstance(amount, bool) or size < 1:
        raise InputError("a budget is a number of bytes", expected="500MB, 2GB, 1.5GiB, …", found=repr(amount))
    return size


def written_bytes(size: float) -> str:
    """Bytes for a reader, and for `read_bytes`: three digits and a unit.

    Example:
        >>> written_bytes(20_450_000), written_bytes(999)
        ('20.4 MB', '999 B')
    """
    for unit in ("TB", "GB", "MB", "KB"):
        if size >= _UNITS[unit]:
            return f"{size / _UNITS[unit]:.3g} {unit}"
    return f"{size:.0f} B"


def within(budget: int, probes: Sequence[str], sample: float, size: Size) -> Choice:
    """Keep as much as fits: first fewer vectors, then without the dearest probe, and so on.

    Args:
        budget: bytes.
        probes: that were asked for.
        sample: share of the tokens whose vectors were asked for.
        size: bytes of a run with such probes and sample.

    Raises:
        InputError: even the tokens alone take more.

    Example:
        >>> within(100, ["tokens", "routing"], 1.0, lambda probes, sample: 60 * len(probes)).lost
        ('left out: routing (60 B)',)
    """
    chosen, lost = list(probes), list[str]()
    least = min(sample, _LEAST_SAMPLE)
    while size(chosen, sample) > budget:
        if VECTORS in chosen and size(chosen, least) <= budget:
            fewer = _largest_sample(budget, chosen, least, sample, size)
            lost.insert(0, f"vectors of {fewer:.3g} of the tokens instead of {sample:.3g}")
            return Choice(tuple(chosen), fewer, tuple(lost))
        optional = [name for name in chosen if name != _ALWAYS]
        if not optional:
            raise InputError(
                f"nothing can be recorded in {written_bytes(budget)}",
                expected=f"at least {written_bytes(size(chosen, sample))}, for the tokens alone",
                found=f"a budget of {budget:,} bytes",
                fix="raise the budget (--budget), or record fewer texts",
            )
        whole = size(chosen, least)
        saved = {name: whole - size([n for n in chosen if n != name], least) for name in optional}
        dearest = max(optional, key=lambda name: saved[name])
        chosen.remove(dearest)
        lost.append(f"left out: {dearest} ({written_bytes(saved[dearest])})")
    return Choice(tuple(chosen), sample, tuple(lost))


def _largest_sample(budget: int, probes: Sequence[str], least: float, most: float, size: Size) -> float:
    """Bisection: sizes rise in steps of blocks and shards, so no formula gives it."""
    for _ in range(30):
        middle = (least + most) / 2
        least, most = (middle, most) if size(probes, middle) <= budget else (least, middle)
    digit = 10.0 ** (math.floor(math.log10(least)) - 2)
    return min(least, round(math.floor(least / digit) * digit, 12))  # three digits, never more than fits
