"""What an edit does to the prediction of every token, from two sets of logits: nothing is read back to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int

from moescope.probes.likelihood import most_likely

# Elements of logits compared at a time: a few copies of so many in float32 are all that is held besides the logits.
_SLICE_ELEMENTS = {"cpu": 1 << 19}
_SLICE_ELEMENTS_ELSEWHERE = 1 << 25

PerToken = Float[torch.Tensor, "row position"]


@dataclass(frozen=True)
class TokenNumbers:
    """Numbers of every token of a batch, each about the distribution that predicted it; 0 at column 0, which nothing predicts.

    Attributes:
        base_nll: −ln p(token | those before it) of the unedited model, nats.
        delta_nll: that of the edited model less it, nats.
        kl: KL(unedited ‖ edited) = Σ p · (ln p − ln q) over the vocabulary, nats.
        flips: 1 where the most likely token is another, else 0.
    """

    base_nll: PerToken
    delta_nll: PerToken
    kl: PerToken
    flips: PerToken


def compared(
    base: Float[torch.Tensor, "row position vocabulary"],
    edited: Float[torch.Tensor, "row position vocabulary"],
    ids: Int[torch.Tensor, "row position"],
    *,
    spans: Sequence[tuple[int, int]] | None = None,
) -> TokenNumbers:
    """Compare the predictions of two passes over the same tokens.

    Equal logits give exactly 0 everywhere. A NaN in either gives NaN; where the edited model gives no probability to what
    the other predicts, the divergence is infinite.

    Args:
        base, edited: logits of both passes, any float type; read a few rows at a time in float32.
        ids: the tokens both were given.
        spans: which of the row · position places hold real tokens, as pairs of first and one past the last; None for all.
            The others are left out (0).

    Example:
        >>> logits = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])
        >>> found = compared(logits, logits + torch.tensor([0.0, 1.0]), torch.tensor([[0, 1]]))
        >>> [round(float(t[0, 1]), 4) for t in (found.base_nll, found.delta_nll, found.kl, found.flips)]
        [0.6931, -0.3799, 0.1201, 1.0]
    """
    rows, positions, vocabulary = base.shape
    first, second = base.reshape(-1, vocabulary), edited.reshape(-1, vocabulary)
    following = F.pad(ids[:, 1:], (0, 1)).flatten().to(base.device)
    found = torch.zeros(4, rows * positions, device=base.device, dtype=torch.float64)
    step = max(1, _SLICE_ELEMENTS.get(base.device.type, _SLICE_ELEMENTS_ELSEWHERE) // vocabulary)
    for begin, end in [(0, len(following))] if spans is None else spans:
        for start in range(begin, end, step):
            part = slice(start, min(start + step, end))
            found[:, part] = _of_slice(first[part].float(), second[part].to(base.device).float(), following[part])
    # What a position predicts is about the token after it.
    shifted = F.pad(found.reshape(4, rows, positions)[..., :-1], (1, 0))
    return TokenNumbers(*shifted.unbind(0))


def _of_slice(
    base: Float[torch.Tensor, "token vocabulary"],
    edited: Float[torch.Tensor, "token vocabulary"],
    following: Int[torch.Tensor, " token"],
) -> Float[torch.Tensor, "4 token"]:
    """Base NLL, ΔNLL, KL and flips of some tokens."""
    log_p, log_q = F.log_softmax(base, -1), F.log_softmax(edited, -1)
    at = following.unsqueeze(-1)
    nll, edited_nll = (-part.gather(-1, at).squeeze(-1).double() for part in (log_p, log_q))
    flips = (most_likely(base) != most_likely(edited)).double()
    p = log_p.exp()
    # What neither pass thinks possible has −∞ on both sides and adds nothing.
    terms = torch.where(p == 0, p, p * (log_p - log_q))
    return torch.stack([nll, edited_nll - nll, terms.sum(-1, dtype=torch.float64), flips])
