"""An attention pattern in slices of queries: never all of [head, query, key] at once, so that memory grows linearly.

The pattern is made anew by the family's own eager function, slice after slice, from what the model's kernel was given: its
queries, keys, mask, scale, soft cap and sinks. Where the kernel is causal by itself (it was given no mask), a slice holds
the keys up to its last query only, since all later ones get nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import nn

# Bytes of one slice. Small enough that its passes stay in a processor's cache; a GPU wants fewer and larger ones.
SLICE_BYTES_CPU, SLICE_BYTES = 8 << 20, 64 << 20

Eager = Callable[..., Any]


class PatternSlice(NamedTuple):
    """The pattern of some consecutive queries.

    Attributes:
        pattern: [row, head, query, key], float32; keys beyond the last one here get nothing from these queries.
        first: which of the pass's queries the first one here is.
    """

    pattern: Float[torch.Tensor, "row head query key"]
    first: int


class PatternSlices:
    """The attention pattern of one module in one pass, made slice by slice while it is iterated over.

    It may be gone over several times, each at the cost of computing it, but only before the pass goes on: what it is made
    of is the model's own.

    Attributes:
        rows, heads, queries, keys: shape of the whole pattern. With a KV cache there are more keys than queries, the pass's
            own last.
        device: where the slices are.
        sinks: whether the softmax has a logit of its own that no key owns, so that rows sum to less than 1.
        refused: why this module has no pattern to show; None where it has. Nothing else is known then, and there are no slices.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        device: torch.device,
        make: Callable[[int, int], torch.Tensor],
        *,
        sinks: bool = False,
        refused: str | None = None,
    ) -> None:
        self.rows, self.heads, self.queries, self.keys = shape
        self.device, self.sinks, self.refused = device, sinks, refused
        self._make = make

    @classmethod
    def none(cls, device: torch.device, reason: str) -> PatternSlices:
        """No pattern, and why."""
        return cls((0, 0, 0, 0), device, lambda *_: torch.empty(0), refused=reason)

    @classmethod
    def of_whole(cls, pattern: torch.Tensor) -> PatternSlices:
        """Of a pattern that a module shows whole, whose memory was spent already."""
        rows, heads, queries, keys = pattern.shape
        return cls(
            (rows, heads, queries, keys),
            pattern.device,
            lambda first, end: pattern[:, :, first:end].detach().float(),
        )

    @property
    def step(self) -> int:
        """Queries of a slice: so many that it takes no more than its bytes, whatever the length."""
        most = SLICE_BYTES_CPU if self.device.type == "cpu" else SLICE_BYTES
        return max(1, most // max(1, 4 * self.rows * self.heads * self.keys))

    def __iter__(self) -> Iterator[PatternSlice]:
        for first in range(0, self.queries, self.step):
            yield PatternSlice(self._make(first, min(first + self.step, self.queries)), first)


def slices_beside(
    eager: Eager, module: nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **named: Any
) -> PatternSlices:
    """The slices that the family's eager function gives for what a kernel was given: query, key, value, mask, ….

    Args:
        eager: the family's eager function.
        module: whose attention it is.
        query, key: [row, head, position, d_head], as the kernel was given them; keys may have fewer heads.
        args, named: the kernel's other arguments.
    """
    value, *rest = args
    mask = rest.pop(0) if rest else named.pop("attention_mask", None)
    causal = named.pop("is_causal", None)
    causal = getattr(module, "is_causal", True) if causal is None else causal
    named["dropout"] = 0.0
    q, k = query.detach().float(), key.detach().float()
    # One column of ones: what comes out is the share of each row that the keys get, the rest being a sink's.
    ones = torch.ones_like(value[..., :1], dtype=torch.float32)
    sinks = has_sinks(module, named)
    alone = mask is None and bool(causal) and q.shape[2] > 1

    def make(first: int, end: int) -> torch.Tensor:
        keys = min(end, k.shape[2]) if alone else k.shape[2]
        part, seen = q[:, :, first:end], k[:, :, :keys]
        added = _causal(first, part, keys) if alone else additive(_of_queries(mask, first, end, q.shape[2]), part)
        others = {name: _cut(given, first, end, q.shape[2], keys, k.shape[2]) for name, given in named.items()}
        share, pattern = eager(module, part, seen, ones[:, :, :keys], added, *rest, **others)
        # Sinks that scale the output instead of taking part in the softmax show in the share alone.
        pattern = _shared(pattern, share) if sinks else pattern
        found: torch.Tensor = pattern.detach().float()
        return found

    return PatternSlices((*q.shape[:3], k.shape[2]), q.device, make, sinks=sinks)


def has_sinks(module: nn.Module, named: Mapping[str, Any]) -> bool:
    """Whether an attention has a logit in its softmax that no key owns, by what its module holds or its kernel is given."""
    return any(given is not None for given in (getattr(module, "sinks", None), named.get("sinks"), named.get("s_aux")))


def additive(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """What the eager function adds to the scores, from a mask that scaled dot products were given."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
    return mask.detach().to(query.dtype)


def _causal(first: int, part: torch.Tensor, keys: int) -> torch.Tensor | None:
    """The mask of a kernel that is causal by itself, for queries from `first` on: query i sees keys up to i."""
    allowed = torch.ones(part.shape[2], keys, dtype=torch.bool, device=part.device).tril(first)
    return additive(allowed[None, None], part)


def _of_queries(mask: torch.Tensor | None, first: int, end: int, queries: int) -> torch.Tensor | None:
    return mask[:, :, first:end] if mask is not None and mask.shape[2] == queries else mask


def _cut(given: Any, first: int, end: int, queries: int, keys: int, all_keys: int) -> Any:
    """An argument of the kernel that has a row a query, as a bias by position has, for some queries and keys."""
    if not isinstance(given, torch.Tensor) or given.ndim < 3 or given.shape[-2] != queries:
        return given
    given = given[..., first:end, :]
    return given[..., :keys] if given.shape[-1] == all_keys else given


def _shared(pattern: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """A pattern whose rows sum to the shares [row, query, head, 1] that an eager function gave for a value of 1."""
    share = share.transpose(1, 2)
    return pattern * (share / pattern.sum(-1, keepdim=True).clamp(min=torch.finfo(pattern.dtype).tiny))


SliceTap = Callable[[PatternSlices], None]
