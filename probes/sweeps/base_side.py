"""Many edited passes against one plain pass: what the plain side needs is computed once, and sums are taken row by row.

The numbers are those of `moescope.probes.effects.token_numbers.compared`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int

from moescope.probes.likelihood import most_likely

METRICS = ("delta_nll", "kl", "flips")
# Elements of logits worked on at a time: what fits into a processor's cache, and what keeps an accelerator busy.
_SLICE_ELEMENTS = {"cpu": 1 << 20}
_SLICE_ELEMENTS_ELSEWHERE = 1 << 26
# Up to so many elements the plain probabilities are kept; beyond, they are computed again for each row.
_HELD = 1 << 27


class BaseSide:
    """The plain pass over a batch, right-padded.

    Args:
        logits: of the plain pass.
        ids: the tokens given.
        lengths: real tokens of each row.

    Attributes:
        nll: base_nll summed over the tokens of each row, nats.

    Example:
        >>> logits = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])
        >>> base = BaseSide(logits, torch.tensor([[0, 1]]), [2])
        >>> [round(float(x), 4) for x in base.against(logits + torch.tensor([0.0, 1.0]), [0])[:, 0]]
        [-0.3799, 0.1201, 1.0]
    """

    def __init__(
        self,
        logits: Float[torch.Tensor, "row position vocabulary"],
        ids: Int[torch.Tensor, "row position"],
        lengths: Sequence[int],
    ) -> None:
        self._logits, self._lengths = logits, list(lengths)
        self._targets = ids[:, 1:].to(logits.device).unsqueeze(-1)
        positions, vocabulary = logits.shape[1:]
        budget = _SLICE_ELEMENTS.get(logits.device.type, _SLICE_ELEMENTS_ELSEWHERE)
        self._step = max(1, budget // vocabulary)
        shape = (len(ids), positions)
        self._total = torch.zeros(shape, device=logits.device)
        self._loss = torch.zeros(shape, device=logits.device)
        self._best = torch.zeros(shape, device=logits.device, dtype=torch.int64)
        self._held = torch.empty(logits.shape, device=logits.device) if logits.numel() <= _HELD else None
        self.nll = torch.zeros(len(ids), device=logits.device, dtype=torch.float64)
        for row in range(len(ids)):
            for part in self._parts(row):
                scores = logits[row, part].float()
                self._total[row, part] = total = scores.logsumexp(-1)
                self._loss[row, part] = total - scores.gather(-1, self._targets[row, part]).squeeze(-1)
                self._best[row, part] = most_likely(scores)
                if self._held is not None:
                    self._held[row, part] = (scores - total.unsqueeze(-1)).exp_()
            self.nll[row] = self._loss[row].sum(dtype=torch.float64)
        self._finite = bool(logits.amin() > -torch.inf)

    def tokens(self, row: int) -> int:
        """Tokens of a row that something predicts."""
        return max(0, self._lengths[row] - 1)

    def against(
        self, edited: Float[torch.Tensor, "row position vocabulary"], rows: Sequence[int]
    ) -> Float[torch.Tensor, "3 row"]:
        """`METRICS` of each row, summed over its predicted tokens; nothing is read back to the host.

        A NaN in the edited logits gives NaN. Equal logits give exactly 0.

        Args:
            edited: logits of an edited pass.
            rows: row of the plain pass that each is.
        """
        found = torch.zeros(len(METRICS), len(rows), device=edited.device, dtype=torch.float64)
        for number, row in enumerate(rows):
            for part in self._parts(row):
                found[:, number] += self._of_slice(edited[number, part].float(), row, part)
        return found

    def _of_slice(self, edited: Float[torch.Tensor, "token vocabulary"], row: int, part: slice) -> torch.Tensor:
        base, before = self._logits[row, part].float(), self._total[row, part]
        total = edited.logsumexp(-1)
        loss = total - edited.gather(-1, self._targets[row, part]).squeeze(-1)
        flips = most_likely(edited) != self._best[row, part]
        p = self._held[row, part] if self._held is not None else (base - before.unsqueeze(-1)).exp_()
        gone = base - edited
        if not self._finite:
            gone = torch.where(p == 0, 0, gone)  # what neither pass thinks possible adds nothing
        kl = torch.linalg.vecdot(p, gone) + (total - before)
        numbers = ((loss - self._loss[row, part]).double(), kl.double(), flips.double())
        return torch.stack([x.sum() for x in numbers])

    def _parts(self, row: int) -> list[slice]:
        """Places of a row whose logits predict a real token, some at a time."""
        end = self.tokens(row)
        return [slice(start, min(start + self._step, end)) for start in range(0, end, self._step)]
