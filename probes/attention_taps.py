"""Taps on attention: its pattern, and per-head queries, keys, values and outputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moescope.core.errors import InputError, RunError
from moescope.core.sites import HEAD_K, HEAD_V, PATTERN, Site
from moescope.probes.anatomy import Anatomy, Sublayer
from moescope.probes.attention_pattern import asks_for_interface, patterns_tapped, slices_tapped
from moescope.probes.attention_slices import PatternSlices, SliceTap
from moescope.probes.block_outputs import runs_again
from moescope.probes.head_vectors import KNOWN_CLASSES, HeadReading, head_vectors

Receive = Callable[[Site, dict[str, torch.Tensor]], None]

# The same place as `hook_pattern`, read in slices of queries; not a site of its own to those who list sites.
PATTERN_SLICES = "hook_pattern_slices"

# Older classes, which compute attention by themselves, and hand their probabilities on as the second output.
_OWN_EAGER = (
    "GPTJAttention",
    "CodeGenAttention",
    "GPTNeoAttention",
    "BloomAttention",
    "MptAttention",
    "GPTNeoXJapaneseAttention",
    "XGLMAttention",
    "FalconAttention",
)
_DIFFERENCES = ("DiffLlamaAttention",)
_CROSS = re.compile(r"cross|encdec|encoder_attn", re.IGNORECASE)


def attention_sites(model: nn.Module, anatomy: Anatomy) -> dict[Site, nn.Module]:
    """Every site of patterns and per-head vectors that a model has; `attention_refusals` says why others are not there.

    Returns:
        Site → the module at which it is read.

    Example:
        >>> import moescope as ms
        >>> model = ms.load("demo")
        >>> [site.tensor for site in attention_sites(model.module, model.anatomy) if site.layer == 0]
        ['hook_pattern', 'hook_q', 'hook_k', 'hook_v', 'hook_z']
    """
    found: dict[Site, nn.Module] = {}
    for s in _mixers(anatomy):
        attention = model.get_submodule(s.path)
        if runs_again(model.get_submodule(anatomy.block_paths[s.layer])):
            continue
        if _why_no_pattern(attention, s) is None:
            found[Site(s.layer, s.block, PATTERN)] = attention
        found |= {site: reading.module for site, reading in _readings(attention, s, anatomy).items()}
    return found


def attention_refusals(model: nn.Module, anatomy: Anatomy) -> dict[Site, str]:
    """Patterns that this model does not offer, with the reason."""
    reasons = {
        Site(s.layer, s.block, PATTERN): _why_no_pattern(model.get_submodule(s.path), s) for s in _mixers(anatomy)
    }
    return {site: reason for site, reason in reasons.items() if reason is not None}


def reducible_sites(model: nn.Module, anatomy: Anatomy) -> dict[Site, nn.Module]:
    """`attention_sites`, and the site `hook_pattern_slices` of every token mixer, also of those that will refuse it."""
    slices = {Site(s.layer, s.block, PATTERN_SLICES): model.get_submodule(s.path) for s in _mixers(anatomy)}
    return attention_sites(model, anatomy) | slices


@contextmanager
def tap_attention(model: nn.Module, anatomy: Anatomy, sites: Collection[Site], receive: Receive) -> Iterator[None]:
    """Call `receive(site, tensors)` whenever the model passes one of `sites`, which are among `attention_sites`.

    Tensors:
        `hook_pattern`: pattern [row, head, query, key], the probabilities with which queries attend to keys; with a KV
            cache there are more keys than queries. In float32 beside sdpa, as the kernel used them where it is eager.
            Rows of a model with sinks sum to less than 1: the rest is the sink's. Rows of padding may hold anything.
            This tensor grows with the square of the length: a receiver must reduce it at once, never keep it whole.
        `hook_pattern_slices`: slices, a `PatternSlices`: the same pattern in slices of queries, computed while one goes over
            them, each [row, head, query, key] in float32. Of a mixer without a pattern it comes too, and says why.
        `hook_q`, `hook_k`, `hook_v`, `hook_z`: q, k, v, z [row, position, head, d_head], as
            `moescope.probes.head_vectors` defines them. With a KV cache, positions are the new ones.

    The model's own attention runs as before. All hooks are gone when the context ends, however it ends.

    Raises:
        InputError: a pattern, with an attention implementation other than sdpa and eager.
    """
    by_place = {(s.layer, s.block): s for s in _mixers(anatomy)}
    patterns: list[tuple[nn.Module, Callable[[torch.Tensor], None]]] = []
    slices: list[tuple[nn.Module, SliceTap]] = []
    with ExitStack() as stack:
        for site in sites:
            s = by_place[site.layer, site.block]
            attention = model.get_submodule(s.path)
            if site.tensor == PATTERN_SLICES:
                give = _slices_giver(site, receive)
                reason = _why_no_slices(model, attention, s, anatomy)
                if reason is not None:
                    stack.callback(
                        attention.register_forward_pre_hook(_refusing_hook(give, reason), with_kwargs=True).remove
                    )
                elif asks_for_interface(attention):
                    slices.append((attention, give))
                else:
                    stack.callback(attention.register_forward_hook(_own_slices_hook(give)).remove)
            elif site.tensor != PATTERN:
                for handle in _head_hooks(site, attention, _readings(attention, s, anatomy)[site], receive):
                    stack.callback(handle.remove)
            elif asks_for_interface(attention):
                patterns.append((attention, _pattern_tap(site, receive)))
            else:
                stack.callback(attention.register_forward_hook(_own_pattern_hook(site, receive)).remove)
        if patterns:
            stack.enter_context(patterns_tapped(patterns))
        if slices:
            stack.enter_context(slices_tapped(slices))
        yield


def _mixers(anatomy: Anatomy) -> list[Sublayer]:
    return [s for s in anatomy.sublayers if s.kind in ("attention", "ssm")]


def _why_no_pattern(attention: nn.Module, s: Sublayer) -> str | None:
    name = type(attention).__name__
    if _CROSS.search(s.path):
        return "its keys are the encoder's positions"
    if getattr(attention, "compressor", None) is not None:
        return "its keys are compressed: they are not the positions of the sequence"
    if name in _DIFFERENCES:
        return "it attends with the difference of two patterns"
    if name in _OWN_EAGER:
        shown = name != "FalconAttention" or getattr(attention.config, "_attn_implementation", "eager") == "eager"
        return None if shown else 'its kernel does not show it: load the model with attn_implementation="eager"'
    if s.kind == "attention" and asks_for_interface(attention):
        return None
    return f"{name} is no attention over keys, or computes it in a way that does not show its probabilities"


def _readings(attention: nn.Module, s: Sublayer, anatomy: Anatomy) -> dict[Site, HeadReading]:
    name = type(attention).__name__
    softmax = s.kind == "attention" and asks_for_interface(attention)
    if not (softmax or name in _OWN_EAGER or name in KNOWN_CLASSES):
        return {}
    found = head_vectors(attention, anatomy.d_model)
    left_out = (HEAD_K, HEAD_V) if _CROSS.search(s.path) else ()  # theirs are the encoder's positions
    return {Site(s.layer, s.block, tensor): r for tensor, r in found.items() if tensor not in left_out}


def _head_hooks(site: Site, attention: nn.Module, reading: HeadReading, receive: Receive) -> Iterator[RemovableHandle]:
    letter = site.tensor.removeprefix("hook_")
    new: list[int] = []

    def begun(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        cache = named.get("past_key_values")
        if getattr(cache, "is_compileable", False):
            raise RunError(
                f"{site} cannot be read with a static KV cache",
                found=f"{type(module).__name__}, whose values are made anew from the whole cache",
                fix="generate with the default cache, or leave this site out",
            )
        new[:] = [(inputs[0] if inputs else named["hidden_states"]).shape[1]]

    def given(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        receive(site, {letter: reading.split(inputs[0] if inputs else next(iter(named.values())))})

    def made(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        heads = reading.split(output)
        receive(site, {letter: heads[:, -new[0] :] if reading.cached else heads})

    if reading.cached:
        yield attention.register_forward_pre_hook(begun, with_kwargs=True)
    if reading.side == "in":
        yield reading.module.register_forward_pre_hook(given, with_kwargs=True)
    else:
        yield reading.module.register_forward_hook(made)


def _pattern_tap(site: Site, receive: Receive) -> Callable[[torch.Tensor], None]:
    def tap(pattern: torch.Tensor) -> None:
        receive(site, {"pattern": pattern})

    return tap


def _own_pattern_hook(site: Site, receive: Receive) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, _inputs: Any, output: tuple[Any, ...]) -> None:
        receive(site, {"pattern": _own_pattern(module, output)})

    return hook


def _own_slices_hook(give: SliceTap) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, _inputs: Any, output: tuple[Any, ...]) -> None:
        give(PatternSlices.of_whole(_own_pattern(module, output)))

    return hook


def _own_pattern(module: nn.Module, output: tuple[Any, ...]) -> torch.Tensor:
    if output[1] is None:
        raise InputError(
            f"{type(module).__name__} did not show its pattern",
            found="a kernel that does not give its probabilities",
            fix='load the model with attn_implementation="eager"',
        )
    pattern: torch.Tensor = output[1]
    return pattern


def _slices_giver(site: Site, receive: Receive) -> SliceTap:
    def give(slices: PatternSlices) -> None:
        receive(site, {"slices": slices})  # type: ignore[dict-item]  # made of tensors, with a device as they have

    return give


def _refusing_hook(give: SliceTap, reason: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = next(t for t in (*inputs, *named.values()) if isinstance(t, torch.Tensor))
        give(PatternSlices.none(given.device, reason))

    return hook


def _why_no_slices(model: nn.Module, attention: nn.Module, s: Sublayer, anatomy: Anatomy) -> str | None:
    if runs_again(model.get_submodule(anatomy.block_paths[s.layer])):
        return "its blocks run several times in one pass"
    return _why_no_pattern(attention, s)
