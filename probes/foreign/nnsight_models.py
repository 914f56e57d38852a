"""An nnsight wrapper: the module inside it, and a live model handed to nnsight."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from typing import Any

from torch import nn

from moescope.core.errors import InputError
from moescope.probes.live_model import LiveModel


def module_inside(wrapper: Any) -> nn.Module:
    """The module that an nnsight wrapper traces, with its real weights.

    A wrapper made from a name holds no weights until it first runs; they are loaded here, as nnsight would load them.
    Edits made by nnsight's `edit` exist only in its own traces: they are not in the module, and so not recorded.

    Raises:
        InputError: the weights cannot be loaded, or are not in this process.
    """
    if getattr(wrapper, "dispatched", True) is False:
        try:
            wrapper.dispatch()
        except (OSError, ValueError, RuntimeError, NotImplementedError, ImportError) as refused:
            raise InputError(
                "nnsight cannot load the weights of this model",
                found=f"{type(refused).__name__}: {' '.join(str(refused).split())[:300]}",
                fix="make the wrapper with dispatch=True, or pass the model's name to load",
            ) from refused
    module = getattr(wrapper, "_module", None)
    if not isinstance(module, nn.Module):
        raise InputError(
            f"{type(wrapper).__name__} of nnsight holds no module in this process",
            fix="load the model itself",
        )
    # accelerate keeps offloaded weights on the meta device too, and brings them in while a module runs.
    if any(p.is_meta for p in module.parameters()) and not hasattr(module, "hf_device_map"):
        raise InputError(
            "this nnsight model has no weights in memory",
            found="parameters on the meta device",
            fix="make the wrapper with dispatch=True",
        )
    return module


def nnsight_wrapper(model: LiveModel) -> Any:
    """A live model as nnsight's own wrapper around the same module; nothing is copied but the tokenizer.

    With a tokenizer, a model of transformers becomes nnsight's language model, which takes texts and ids; any other
    becomes its plain wrapper, which takes what the module's `forward` takes.

    Raises:
        InputError: nnsight is not installed.
    """
    if importlib.util.find_spec("nnsight") is None:
        raise InputError("nnsight is not installed", fix="pip install 'moescope[nnsight]'")
    nnsight: Any = importlib.import_module("nnsight")
    if model.tokenizer is None or not hasattr(model.module, "can_generate"):
        return nnsight.NNsight(model.module)
    # nnsight turns the tokenizer's padding to the left.
    return nnsight.TransformersModel(model.module, task="text-generation", tokenizer=copy.deepcopy(model.tokenizer))
