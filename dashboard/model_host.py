"""The live model behind the lab: loaded once, asked one request at a time, in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from moescope.probes.live_model import LiveModel

T = TypeVar("T")


class ModelHost:
    """Holds one model and a thread that runs everything asked of it.

    Args:
        source: what `moescope.load` takes; None until a page chooses.
    """

    def __init__(self, source: str | None = None) -> None:
        self.source = source

    def ask(self, request: Callable[[LiveModel], T], *, who: str) -> T:
        """Run a request on the model and wait for its answer; a newer request of the same asker replaces one that waits."""
        raise NotImplementedError
