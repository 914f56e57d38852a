"""Negative log-likelihood from logits, in slices, so that no second copy of a batch's logits is ever held."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int

_SLICE_ELEMENTS = {"cpu": 1 << 20}
_SLICE_ELEMENTS_ELSEWHERE = 1 << 25


def token_nll(
    logits: Float[torch.Tensor, "row position vocabulary"],
    ids: Int[torch.Tensor, "row position"],
    *,
    spans: Sequence[tuple[int, int]] | None = None,
) -> tuple[Float[torch.Tensor, "row position"], Int[torch.Tensor, "row position"]]:
    """NLL of every token given those before it, and the most likely next token at every position.

    Args:
        logits: the model's output, any float type; read once, a few rows at a time in float32.
        ids: the tokens the model was given.
        spans: which of the row · position places hold real tokens, as pairs of first and one past the last; None for all.
            The others are left out (NaN and 0).

    Returns:
        nll in nats (equal to `CrossEntropyLoss` on float32 logits), NaN at column 0, where nothing was predicted (with
        padding at the left, the value at a sequence's first token means nothing either); and the arg-max of the logits
        at each position. Nothing is read back to the host.

    Example:
        >>> nll, best = token_nll(torch.zeros(1, 2, 4), torch.tensor([[1, 3]]))
        >>> round(float(nll[0, 1]), 4)
        1.3863
    """
    rows, positions, vocabulary = logits.shape
    flat = logits.reshape(rows * positions, vocabulary)
    following = F.pad(ids[:, 1:], (0, 1)).flatten()
    losses = torch.full((rows * positions,), torch.nan, device=logits.device)
    best = torch.zeros(rows * positions, device=logits.device, dtype=torch.int64)
    step = max(1, _SLICE_ELEMENTS.get(logits.device.type, _SLICE_ELEMENTS_ELSEWHERE) // vocabulary)
    for first, end in [(0, len(flat))] if spans is None else spans:
        for start in range(first, end, step):
            part = slice(start, min(start + step, end))
            scores = flat[part].float()
            losses[part] = F.cross_entropy(scores, following[part], reduction="none")
            best[part] = most_likely(scores)
    shifted = torch.full((rows, positions), torch.nan, device=logits.device)
    shifted[:, 1:] = losses.reshape(rows, positions)[:, :-1]
    return shifted, best.reshape(rows, positions)


def most_likely(scores: Float[torch.Tensor, "token vocabulary"]) -> Int[torch.Tensor, " token"]:
    """The first largest score of each row; on a CPU by NumPy, which is some five times faster at it than torch."""
    if scores.device.type == "cpu":
        return torch.from_numpy(scores.numpy().argmax(-1))
    return scores.argmax(-1)
