"""`trace`: the same model, without a copy, in the hands of nnsight."""

from __future__ import annotations

from typing import Any

from moescope.probes.foreign.nnsight_models import nnsight_wrapper
from moescope.probes.live_model import LiveModel

_HELD = "_nnsight_wrapper"


def wrapped(model: LiveModel) -> Any:
    """nnsight's wrapper around a live model: made once, so that what a trace saves is found under one set of names.

    Raises:
        InputError: nnsight is not installed.
    """
    held = model.__dict__.get(_HELD)
    if held is None or held._module is not model.module:
        held = model.__dict__[_HELD] = nnsight_wrapper(model)
    return held


def trace(model: LiveModel, *inputs: Any, **options: Any) -> Any:
    """nnsight's tracing context over a live model.

    The module is the same, so our taps and edits are on inside the context where they are on outside it: what nnsight
    reads is then the edited model, and a trace that edits is recorded as edited.

    Args:
        model: any live model.
        inputs: what to run: texts or token ids.
        options: whatever nnsight's `trace` takes.

    Raises:
        InputError: nnsight is not installed.
    """
    return wrapped(model).trace(*inputs, **options)
