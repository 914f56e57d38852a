"""Reading the experts' eager loop as it runs: what it multiplies by a token's weight is that expert's output for the token.

The loop runs on the model's own inputs, so that its sums are the model's own to the bit. Its weights are handed over as a
tensor that notes, wherever some of them are picked and multiplied, which they were and by what.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int

_PICK = {"__getitem__"}
_CAST = {"float", "to", "type", "type_as"}
_MULTIPLY = {"mul", "__mul__", "__rmul__", "multiply"}


@dataclass
class LoopNotes:
    """What was seen of one run of a loop, expert by expert in the order it took.

    Attributes:
        tokens, slots: of each expert, the token and the slot of every row it computed.
        outs: of each expert, its rows' outputs before their weights.
        posts: neurons of the experts that have any; null experts, which have none, come last in every loop.
    """

    tokens: list[Int[torch.Tensor, " row"]] = field(default_factory=list)
    slots: list[Int[torch.Tensor, " row"]] = field(default_factory=list)
    outs: list[Float[torch.Tensor, "row d_model"]] = field(default_factory=list)
    posts: list[Float[torch.Tensor, "row d_expert"]] = field(default_factory=list)

    def out(self, tokens: int, k: int) -> Float[torch.Tensor, "token k d_model"]:
        """Every slot's output, in token order; zero where no expert ran (ids of other ranks' experts)."""
        found = torch.cat(self.outs)
        slots = found.new_zeros(tokens * k, found.shape[-1])
        return slots.index_copy(0, self.place(k), found).reshape(tokens, k, -1)

    def place(self, k: int, experts: int | None = None) -> Int[torch.Tensor, " row"]:
        """Which place of token · k each computed row is, of the first so many experts that ran."""
        pairs = zip(self.tokens[:experts], self.slots[:experts], strict=True)
        return torch.cat([token * k + slot for token, slot in pairs])


class WatchedWeights(torch.Tensor):
    """Router weights that note what they are multiplied with, [token, k]. In every other respect the plain tensor."""

    notes: LoopNotes
    at: tuple[torch.Tensor, torch.Tensor] | None

    @classmethod
    def around(
        cls, weights: torch.Tensor, notes: LoopNotes, at: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> WatchedWeights:
        """The same weights, watched; `at` are the tokens and slots that they were picked from, None for all."""
        watched = weights.as_subclass(cls)
        watched.notes, watched.at = notes, at
        return watched

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        mine = next((a for a in args if isinstance(a, WatchedWeights)), None)
        if mine is None or not hasattr(mine, "notes"):
            return result
        if name in _PICK and mine.at is None and isinstance(args[1], tuple) and len(args[1]) == 3:
            return cls.around(result, mine.notes, args[1][:2])
        if name in _CAST and isinstance(result, torch.Tensor):
            return cls.around(result, mine.notes, mine.at)
        if name in _MULTIPLY and mine.at is not None:
            other = next(a for a in args if a is not mine)
            mine.notes.tokens.append(mine.at[0])
            mine.notes.slots.append(mine.at[1])
            mine.notes.outs.append(other)
        return result


class Activated:
    """act(gate) of one expert, on its way to be multiplied by up: the product, which is its neurons, is noted."""

    def __init__(self, activated: torch.Tensor, notes: LoopNotes) -> None:
        self.activated, self.notes = activated, notes

    def __mul__(self, up: torch.Tensor) -> torch.Tensor:
        product = self.activated * up
        self.notes.posts.append(product)
        return product

    __rmul__ = __mul__
