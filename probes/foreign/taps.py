"""Taps through the hook points of another library, where our own hooks would not see what really runs."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moescope.core.errors import InputError
from moescope.core.sites import EXPERT_INDICES, EXPERT_OUT, EXPERT_POST, EXPERT_WEIGHTS, ROUTER_LOGITS, SHARED_OUT, Site
from moescope.probes.anatomy import Anatomy

Receive = Callable[[Site, dict[str, torch.Tensor]], None]

# What a bridge leaves as it is: routers, experts and shared experts of transformers run inside it.
_INTERIOR = (ROUTER_LOGITS, EXPERT_INDICES, EXPERT_WEIGHTS, EXPERT_OUT, EXPERT_POST, SHARED_OUT)


@dataclass(frozen=True)
class Point:
    """A module whose output holds the tensor of a site.

    Attributes:
        module: one behind which the model goes on with that tensor.
        name: what the tensor is called where taps hand it over.
        read: from that output to the tensor as it is handed over.
    """

    module: nn.Module
    name: str
    read: Callable[[Any], torch.Tensor]


class RoutedLayer(Protocol):
    """A layer whose sites take more than one hook each."""

    @property
    def sites(self) -> Sequence[Site]:
        """Sites it has."""

    def hooks(self, sites: Collection[Site], receive: Receive) -> list[RemovableHandle]:
        """Hooks that hand over the tensors of some of them."""


class ForeignTaps:
    """What can be tapped in a model of another library.

    Args:
        points: site → where it is.
        routed: layers with a router of that library's own.
        whole: whether these are all sites of the model; otherwise routers and experts are tapped as in transformers.
    """

    def __init__(self, points: Mapping[Site, Point], routed: Sequence[RoutedLayer] = (), *, whole: bool) -> None:
        self._points, self._routed, self.whole = points, routed, whole
        self.served = frozenset([*points, *(site for layer in routed for site in layer.sites)])

    def sites(self, own: Iterable[Site] = ()) -> list[Site]:
        """Every site of the model, `own` being those that hooks on transformers modules would find."""
        kept = () if self.whole else (site for site in own if site.tensor in _INTERIOR)
        return sorted({*self.served, *kept})

    @contextmanager
    def tap(self, sites: Collection[Site], receive: Receive) -> Iterator[list[Site]]:
        """Hand over the tensors of the sites served here; gives the sites that are left to hooks on transformers modules.

        Raises:
            InputError: a site that this model does not have.
        """
        left = [site for site in sites if site not in self.served]
        for site in left:
            if self.whole or site.tensor not in _INTERIOR:
                near = difflib.get_close_matches(str(site), map(str, self.sites()), 3, 0.3)
                raise InputError(f"this model has no site {site}", expected=f"for instance {', '.join(near)}")
        handles: list[RemovableHandle] = []
        try:
            for site in sites:
                if site in self._points:
                    point = self._points[site]
                    handles.append(point.module.register_forward_hook(_giving(site, point, receive)))
            for layer in self._routed:
                asked = [site for site in sites if site in layer.sites]
                handles += layer.hooks(asked, receive) if asked else []
            yield left
        finally:
            for handle in handles:
                handle.remove()


def foreign_taps(module: nn.Module, anatomy: Anatomy) -> ForeignTaps | None:
    """The taps of the library a model comes from; None for a model of transformers as it is."""
    from moescope.probes.foreign import bridge, hooked_transformer

    if isinstance(module, hooked_transformer.HookedForward):
        return hooked_transformer.hooked_taps(module, anatomy)
    return bridge.bridge_taps(module, anatomy)


def _giving(site: Site, point: Point, receive: Receive) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        receive(site, {point.name: point.read(output)})

    return hook
