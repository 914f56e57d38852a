"""How an experts module computes: what can be reached inside it, found by looking at the module.

Three ways are known. A *kernel* (grouped_mm, batched_mm) computes all (token, slot) pairs at once and passes each through
fixed points of the module. A *loop* runs expert after expert and multiplies each one's output by its tokens' weights.
Anything else is *opaque*: only its inputs and outputs are known.
"""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import nn

Way = Literal["grouped_mm", "batched_mm", "loop", "opaque"]

# Experts modules outside transformers' dispatch whose `forward` is known to be the plain loop.
_LOOPS = ("DbrxExperts", "LongcatFlashExperts", "Step3p7Experts")
_COMPUTABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def why_unreachable(experts: nn.Module) -> str | None:
    """Why the outputs of single slots cannot be read, None where they can.

    Example:
        >>> from torch import nn
        >>> why_unreachable(nn.Linear(2, 2))
        'its forward does not take hidden states, expert ids and weights'
    """
    if isinstance(experts, (nn.ModuleDict, nn.ModuleList)):
        return "it is called with a mask over experts, or expert by expert, and never with expert ids"
    names = argument_names(experts)
    if "expert_size" in names:
        return "it is given rows sorted by expert, and never expert ids"
    if len(names) == 1 and _stacked(experts):
        return "it runs every expert on every token, whatever the router chose"
    if len(names) != 3:
        return "its forward does not take hidden states, expert ids and weights"
    packed = {str(p.dtype).removeprefix("torch.") for p in experts.parameters() if p.dtype not in _COMPUTABLE}
    if packed:
        return f"its weights are quantised ({', '.join(sorted(packed))}), and the kernels that read them are closed"
    return None


def reachable(experts: nn.Module) -> bool:
    """Whether the output of every (token, slot) pair can be read, without running experts that were not chosen."""
    return why_unreachable(experts) is None


def neurons_reachable(experts: nn.Module) -> bool:
    """Whether the input of the down projection, the experts' neurons, can be read as well."""
    return reachable(experts) and (is_dispatched(experts) or type(experts).__name__ in _LOOPS)


def is_dispatched(experts: nn.Module) -> bool:
    """Whether transformers chooses the module's computation from its table of experts implementations."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    forward: Any = type(experts).forward
    if not (hasattr(forward, "__wrapped__") and hasattr(experts, "config")):
        return False
    return inspect.getclosurevars(forward).nonlocals.get("experts_interface") is ALL_EXPERTS_FUNCTIONS


def ways_of(experts: nn.Module) -> dict[str | None, Way]:
    """Implementation's name → how it computes; a name that is not in it is opaque. For modules not dispatched: None."""
    from transformers.integrations import moe

    if type(experts).__name__ in _LOOPS and not is_dispatched(experts):
        return {None: "loop"}
    if not is_dispatched(experts):
        return {}
    ways: dict[str | None, Way] = {}
    if type(experts).__module__.startswith("transformers."):  # a loop of somebody else's may use its weights otherwise
        ways |= {"eager": "loop", None: "loop"}
    # A rank of expert parallelism remaps ids inside the instance's own forward, where they cannot be followed.
    followed = not (getattr(experts, "_is_expert_parallel", False) and "forward" in vars(experts))
    if followed and hasattr(experts, "has_post_expert_norm"):
        table = moe.ALL_EXPERTS_FUNCTIONS
        if table.get("grouped_mm") is moe.grouped_mm_experts_forward:
            ways["grouped_mm"] = "grouped_mm"
        if table.get("batched_mm") is moe.batched_mm_experts_forward:
            ways["batched_mm"] = "batched_mm"
    return ways


def gate_place(experts: nn.Module) -> tuple[nn.Module, str, bool]:
    """Where neurons pass: a module, its attribute, and whether that gives act(gate), which is yet to be multiplied by up."""
    gate = getattr(type(experts), "_apply_gate", None)
    if gate is not None and gate.__name__ != "_default_apply_gate":
        return experts, "_apply_gate", False
    if type(experts).__name__ == "DbrxExperts":
        return experts.get_submodule("mlp"), "activation_fn", True
    return experts, "act_fn", bool(getattr(experts, "has_gate", True))


def argument_names(experts: nn.Module) -> list[str]:
    """Names of what the module's forward takes."""
    return [name for name in inspect.signature(type(experts).forward).parameters if name != "self"]


def _stacked(experts: nn.Module) -> bool:
    return any(parameter.dim() == 3 for parameter in experts.parameters(recurse=False))
