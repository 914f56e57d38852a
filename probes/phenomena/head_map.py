"""Every attention head of a model in one row of numbers, and the way back to layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.core.sites import Site
from moescope.probes.attention_reduced import attention_reduced
from moescope.probes.attention_slices import PatternSlices
from moescope.probes.live_model import LiveModel
from moescope.probes.phenomena.one_sequence import run_ids


@dataclass(frozen=True)
class HeadPlace:
    """One attention of one block.

    Attributes:
        layer, block: where.
        heads: how many query heads it has.
        groups: how many key-value heads; `heads` where each has its own.
        window: keys that a query can see at most, itself included; None for all.
    """

    layer: int
    block: str
    heads: int
    groups: int
    window: int | None = None


@dataclass(frozen=True)
class HeadMap:
    """Where the heads of a model are: columns of every [..., head] array here are in this order.

    Attributes:
        places: the attentions whose patterns can be read, by layer.
        refused: layers without, and why.
    """

    places: tuple[HeadPlace, ...]
    refused: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Heads in all."""
        return sum(place.heads for place in self.places)

    @cached_property
    def slices(self) -> dict[tuple[int, str], slice]:
        """Columns of each place."""
        ends = np.cumsum([place.heads for place in self.places]).tolist()
        return {(p.layer, p.block): slice(end - p.heads, end) for p, end in zip(self.places, ends, strict=True)}

    @property
    def layer_numbers(self) -> list[int]:
        """Layers that have heads, in order."""
        return sorted({place.layer for place in self.places})

    @property
    def layers(self) -> NDArray[np.int64]:
        """Layer of each column."""
        return np.concatenate([np.full(p.heads, p.layer) for p in self.places])

    def split(self, values: NDArray[Any]) -> Iterator[tuple[HeadPlace, NDArray[Any]]]:
        """Columns place by place."""
        for place in self.places:
            yield place, values[..., self.slices[place.layer, place.block]]

    def name(self, column: int) -> str:
        """`L3·H7` of a column."""
        place, head = self.at(column)
        return f"L{place.layer}{'' if place.block == 'attn' else ' ' + place.block}·H{head}"

    def at(self, column: int) -> tuple[HeadPlace, int]:
        """The place of a column and its head there."""
        for place in self.places:
            columns = self.slices[place.layer, place.block]
            if columns.start <= column < columns.stop:
                return place, column - columns.start
        raise IndexError(column)


def head_map(model: LiveModel) -> HeadMap:
    """Find the heads whose attention can be read; how many there are is seen in a pass over two tokens.

    Raises:
        InputError: there are none, with the reason.
    """
    shapes: dict[tuple[int, str], PatternSlices] = {}

    def see(site: Site, slices: PatternSlices) -> None:
        shapes[site.layer, site.block] = slices

    with torch.no_grad(), attention_reduced(model, None, see) as left_out:
        run_ids(model, [1, 2])
    refused = {(site.layer, site.block): reason for site, reason in left_out.items()}
    refused |= {place: slices.refused for place, slices in shapes.items() if slices.refused}
    reasons = tuple(f"L{layer} {block}: {reason}" for (layer, block), reason in sorted(refused.items()))
    modules = {(s.layer, s.block): model.module.get_submodule(s.path) for s in model.anatomy.sublayers}
    places = tuple(_place(at, modules[at], shapes[at].heads) for at in sorted(shapes) if at not in refused)
    if not places:
        raise InputError(
            f"{model.name} has no attention heads to look at",
            expected="a model with attention over keys that are its tokens",
            found=reasons[0] if reasons else "no attention layer at all",
        )
    return HeadMap(places, reasons)


def _place(at: tuple[int, str], attention: Any, heads: int) -> HeadPlace:
    share = getattr(attention, "num_key_value_groups", None)
    groups = heads // share if isinstance(share, int) and share > 0 and heads % share == 0 else heads
    return HeadPlace(*at, heads, groups, _window(attention))


def _window(attention: Any) -> int | None:
    """The sliding window of an attention, as its module says or, where it does not, its configuration."""
    config = getattr(attention, "config", None)
    window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    types = getattr(config, "layer_types", None)
    number = getattr(attention, "layer_idx", None)
    if not hasattr(attention, "sliding_window") and types and number is not None and "sliding" not in types[number]:
        window = None
    return window if isinstance(window, int) and window > 0 else None
