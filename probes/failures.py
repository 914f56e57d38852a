"""What a failure on the way means, and what to do about it."""

from __future__ import annotations

import torch

from moescope.core.errors import RunError


def reason_of(failure: BaseException | None) -> str | None:
    """Why a run stopped, in a few words; None where it did not."""
    if failure is None:
        return None
    return "interrupted" if isinstance(failure, KeyboardInterrupt) else f"{type(failure).__name__}: {failure}"


def explained(failure: BaseException) -> RunError:
    """The error to tell of a failure of the model or the device."""
    text = " ".join(str(failure).split())[:400]
    if isinstance(failure, torch.OutOfMemoryError) or "out of memory" in text or isinstance(failure, MemoryError):
        return RunError(
            "the device ran out of memory",
            found=text,
            fix="lower batch_size or max_length; chunks written before are whole",
        )
    return RunError(
        "the model failed on the way",
        found=f"{type(failure).__name__}: {text}",
        fix="chunks written before are whole; see the cause above with --debug",
    )
