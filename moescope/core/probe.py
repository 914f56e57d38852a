"""The registry of probes: a probe records one kind of thing during a forward pass, as rows of its tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moescope.core.registry import Registry


@dataclass(frozen=True)
class ProbeEntry:
    """A registered probe.

    Attributes:
        name: what the user asks for (`probes=("routing",)`).
        function: the class; called with a `moescope.probes.probe.ProbeContext`.
        tables: tables it writes, the main one first.
        default: whether a run records it unless told otherwise.
    """

    name: str
    function: type[Any]
    tables: tuple[str, ...]
    default: bool


probes: Registry[ProbeEntry] = Registry("probe", "moescope.probes.recorders")


def probe(*, name: str, tables: tuple[str, ...], default: bool = False) -> Callable[[type[Any]], type[Any]]:
    """Register the decorated class as a probe."""

    def register(cls: type[Any]) -> type[Any]:
        probes.add(name, ProbeEntry(name, cls, tables, default))
        return cls

    return register
