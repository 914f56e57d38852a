"""Loading the live model, stopping it in the middle of a pass, and what is told of its failures."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moescope.core.errors import InputError, MoescopeError, RunError
from moescope.dashboard.model_requests import Stopped

if TYPE_CHECKING:
    from moescope.probes.live_model import LiveModel

_LOG = logging.getLogger("moescope.dashboard")


def no_model() -> InputError:
    """The refusal where no model is chosen."""
    return InputError(
        "no model is chosen",
        expected="one that moescope.load takes, for instance demo",
        fix="choose one on the page Lab, or start with moescope dashboard STORE --model demo",
    )


def from_hub(source: str) -> bool:
    """Whether a source is neither the bundled model nor anything on this disk, so that loading it may fetch it."""
    return source != "demo" and not Path(source).exists()


def load_model(source: str) -> LiveModel:
    """The model as a notebook loads it."""
    import moescope as ms

    return ms.load(source)


@contextmanager
def stoppable(model: LiveModel, stop: threading.Event) -> Iterator[None]:
    """While the context lasts, the model raises before its next pass or block once `stop` is set."""

    def look(_module: Any, _inputs: Any) -> None:
        if stop.is_set():
            raise stopped()

    paths = dict.fromkeys(("", *getattr(model.anatomy, "block_paths", ())))
    handles = [model.module.get_submodule(path).register_forward_pre_hook(look) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stopped() -> Stopped:
    """What is raised where the user stopped the model."""
    return Stopped("this was stopped", fix="ask again; the model is ready for it")


def not_loaded(source: str, failure: Exception) -> MoescopeError:
    """What a page is told of a model that could not be loaded."""
    if isinstance(failure, MoescopeError):
        failure.fix = failure.fix or "choose another model, or correct this one's name"
        return failure
    _LOG.error("%s could not be loaded", source, exc_info=failure)
    found = f"{type(failure).__name__}: {' '.join(str(failure).split())[:400]}"
    return InputError(f"{source} could not be loaded", found=found, fix="choose another model, or try again")


def told(failure: BaseException) -> BaseException:
    """What the asker is told: failures of the model in moescope's words, everything else as it is."""
    if isinstance(failure, MoescopeError) or not isinstance(failure, Exception):
        return failure
    _LOG.error("a request of the model failed", exc_info=failure)
    from moescope.probes.failures import explained

    problem: RunError = explained(failure)
    problem.__cause__ = failure
    return problem


def bytes_of(model: LiveModel) -> int:
    """Bytes of its weights and buffers."""
    module = model.module
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
