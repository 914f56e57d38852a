"""Steps of attention heads put into an attention module: before its kernel, and before its output projection.

A module asks `ALL_ATTENTION_FUNCTIONS` of its source file for the function that computes attention, at every call. While
heads are edited, that object has an answer of its own: the function that it would have given, with queries edited first.
Whatever wraps its class (`moescope.probes.attention_pattern`) is inside, in whichever order contexts began, and sees edited
queries.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from moescope.core.sites import HEAD_Z
from moescope.probes.anatomy import Sublayer
from moescope.probes.edits.attach_stream import Editing
from moescope.probes.edits.step import HeadStep
from moescope.probes.head_vectors import Split, head_vectors

_EDITS = "_moescope_query_edits"
_METHOD = "get_interface"

_lock = threading.Lock()
_users: list[tuple[int, object]] = []


def attach_heads(stack: ExitStack, session: Editing, sublayer: Sublayer, program: Sequence[HeadStep[Any]]) -> None:
    """Put the steps of an attention module into it until `stack` closes.

    Args:
        stack: gets a callback for everything that is put in.
        session: tells of the pass that runs.
        sublayer: the attention's.
        program: its steps, in the order in which they act.
    """
    attention = session.module.get_submodule(sublayer.path)
    if any(_queries(step) for step in program):
        _edit_queries(stack, attention, _QueryEdit(session, program))
    if any(not _queries(step) for step in program):
        reading = head_vectors(attention, session.anatomy.d_model)[HEAD_Z]
        hook = _output_hook(session, program, reading.split)
        handle = reading.module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
        stack.callback(handle.remove)


def _queries(step: HeadStep[Any]) -> bool:
    """Whether a step acts on queries, and not on outputs."""
    return getattr(step, "how", None) == "uniform"


class _QueryEdit:
    """The steps of one session at one attention module."""

    def __init__(self, session: Editing, program: Sequence[HeadStep[Any]]) -> None:
        self.session, self.program = session, program

    def __call__(self, query: torch.Tensor) -> torch.Tensor:
        now = self.session.now
        if now is None:
            return query
        for step in self.program:
            query = step.queries(query, now)
        return query


def _output_hook(session: Editing, program: Sequence[HeadStep[Any]], split: Split) -> Callable[..., Any]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        now = session.now
        if now is None:
            return None
        name = next(iter(named), "")
        given: torch.Tensor = inputs[0] if inputs else named[name]
        z = split(given.reshape(*now.mask.shape, given.shape[-1]))
        for step in program:
            z = step.outputs(z, now)
        z = z.reshape(given.shape)
        return ((z, *inputs[1:]), named) if inputs else (inputs, {**named, name: z})

    return hook


def _edit_queries(stack: ExitStack, attention: nn.Module, edit: _QueryEdit) -> None:
    token, functions = object(), _functions_of(attention)
    stack.callback(_uninstall, functions, token)
    _install(functions, token)
    setattr(attention, _EDITS, (*getattr(attention, _EDITS, ()), edit))

    def remove() -> None:
        left = tuple(other for other in getattr(attention, _EDITS) if other is not edit)
        setattr(attention, _EDITS, left) if left else delattr(attention, _EDITS)

    stack.callback(remove)


def _functions_of(attention: nn.Module) -> Any:
    """The object that a module asks: nearly always the one of transformers, in a family or two one of its own."""
    return inspect.unwrap(type(attention).forward).__globals__["ALL_ATTENTION_FUNCTIONS"]


def _install(functions: Any, token: object) -> None:
    with _lock:
        _users.append((id(functions), token))
        vars(functions)[_METHOD] = functools.partial(_get_interface, functions)


def _uninstall(functions: Any, token: object) -> None:
    with _lock:
        if (id(functions), token) in _users:
            _users.remove((id(functions), token))
        if not any(owner == id(functions) for owner, _ in _users):
            vars(functions).pop(_METHOD, None)


def _get_interface(functions: Any, implementation: str | None, default: Callable[..., Any]) -> Callable[..., Any]:
    kernel: Callable[..., Any] = type(functions).get_interface(functions, implementation, default)

    def attention(module: nn.Module, query: torch.Tensor, *args: Any, **named: Any) -> Any:
        for edit in getattr(module, _EDITS, ()):
            query = edit(query)
        return kernel(module, query, *args, **named)

    return attention
