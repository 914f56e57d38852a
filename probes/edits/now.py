"""What an edit may know of the forward pass that runs: which row is under which intervention, and where its tokens stand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int


@dataclass
class Now:
    """The pass that runs, on the device of the model's inputs.

    Attributes:
        ids: token ids fed.
        mask: real tokens among them.
        position: place of each token in its sequence, 0-based, padding not counted, tokens of earlier passes counted.
        generated: whether the pass goes on from a cache (its tokens come after the prompt's).
        row: which intervention each row is under.
        sequences: ids of the rows' sequences, where the caller told them (`Edited.begin`); None elsewhere.
    """

    ids: Int[torch.Tensor, "row position"]
    mask: Bool[torch.Tensor, "row position"]
    position: Int[torch.Tensor, "row position"]
    generated: bool
    row: Int[torch.Tensor, " row"]
    sequences: tuple[int, ...] | None = None

    @cached_property
    def row_of_token(self) -> Int[torch.Tensor, " token"]:
        """Which intervention each token is under, rows laid end to end as experts are given them."""
        return self.row[:, None].expand(self.ids.shape).reshape(-1)
