"""Sparse autoencoders over recorded vectors: train, judge, read, join to experts, steer. Public names are in `moescope.sae`.

Names resolve when first used, so that importing this loads neither torch nor SAELens.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME: dict[str, str] = {}

__all__ = sorted(_HOME)  # noqa: PLE0605  it is a list of str


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moescope.sae' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
