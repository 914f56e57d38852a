"""What steering is meant to move: the probability of tokens, a latent's activation, or a probe's answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float

from moescope.core.errors import InputError
from moescope.core.sites import EXPERT_OUT, EXPERT_POST, Site
from moescope.sae.autoencoder import Autoencoder

if TYPE_CHECKING:
    from moescope.probes.live_model import LiveModel

Seen = Mapping[Site, Float[torch.Tensor, "row position component"]]


class Target(ABC):
    """A number of every token that steering is meant to raise.

    Attributes:
        name: in words.
        metric: what it is called in the store.
        unit: of it.
        sites: whose vectors it needs.
    """

    name: str
    metric: str
    unit: str
    sites: tuple[Site, ...] = ()

    @abstractmethod
    def values(
        self, logits: Float[torch.Tensor, "row position vocabulary"], seen: Seen
    ) -> Float[torch.Tensor, "row position"]:
        """The number at each token of a pass, in float64; for predictions that of the token after it."""


class TokenTarget(Target):
    """Log-probability of a set of tokens, wherever something is predicted: ln Σ p(t | context); or the mean of their logits.

    Args:
        model: whose tokenizer reads texts.
        tokens: a text, several, or token ids; a text must be one token.
        measure: `logprob` in nats, or `logit`.

    Raises:
        InputError: a text of several tokens, or an id out of range.

    Example:
        >>> import moescope as ms
        >>> TokenTarget(ms.load("demo"), [5, 6]).name
        'log p of 2 tokens'
    """

    def __init__(
        self,
        model: LiveModel,
        tokens: str | int | Sequence[str | int],
        *,
        measure: Literal["logprob", "logit"] = "logprob",
    ) -> None:
        given = [tokens] if isinstance(tokens, (str, int)) else list(tokens)
        self.ids = tuple(dict.fromkeys(_token(model, item) for item in given))
        if not self.ids:
            raise InputError("the target has no token", fix="name one, such as ' Python'")
        self.measure = measure
        told = repr(given[0]) if len(given) == 1 else f"{len(self.ids)} tokens"
        self.name = f"{'log p' if measure == 'logprob' else 'logit'} of {told}"
        self.metric, self.unit = ("target_logprob", "nats") if measure == "logprob" else ("target_logit", "logits")

    def values(self, logits: torch.Tensor, seen: Seen) -> torch.Tensor:
        """Of each position, about the token after it; the last one's is left out by whoever sums."""
        del seen
        ids = torch.tensor(self.ids, device=logits.device)
        found = torch.zeros(logits.shape[:2], dtype=torch.float64, device=logits.device)
        for row in range(len(logits)):  # a row at a time: a copy of all logits in float32 may not fit
            scores = logits[row].float()
            ours = scores.index_select(-1, ids)
            found[row] = (
                ours.logsumexp(-1) - scores.logsumexp(-1) if self.measure == "logprob" else ours.mean(-1)
            ).double()
        return torch.nn.functional.pad(found[:, :-1], (1, 0))


class LatentTarget(Target):
    """Activation of a latent at its autoencoder's own site.

    Args:
        autoencoder: whose latent.
        feature: number of the latent.
    """

    metric, unit = "target_activation", "units of activation"

    def __init__(self, autoencoder: Autoencoder, feature: int) -> None:
        if not 0 <= feature < autoencoder.d_sae:
            raise InputError(f"there is no latent {feature}", expected=f"0 to {autoencoder.d_sae - 1}")
        alone = getattr(autoencoder, "head", None) is not None or autoencoder.expert is not None
        if alone or autoencoder.site.tensor in (EXPERT_OUT, EXPERT_POST):
            raise InputError(
                f"{autoencoder.name!r} reads a part of a token's vectors, which gives no number of every token",
                expected="an autoencoder of the stream, of a sublayer, or of all heads",
            )
        self.autoencoder, self.feature = autoencoder, feature
        self.sites = (autoencoder.site,)
        self.name = f"latent {feature} of {autoencoder.name}"

    def values(self, logits: torch.Tensor, seen: Seen) -> torch.Tensor:
        """Of each token itself."""
        del logits
        vectors = seen[self.autoencoder.site]
        return self.autoencoder.encode(vectors.to(self.autoencoder.device))[..., self.feature].double()


class ProbeTarget(Target):
    """Answer of a logistic probe of the vectors at a site, σ(weights · x + bias): a label's, say.

    Args:
        site: where it reads.
        weights: one number a component.
        bias: of the probe.
        name: what it tells.
    """

    metric, unit = "target_probability", "probability"

    def __init__(self, site: Site | str, weights: Any, bias: float = 0.0, *, name: str = "probe") -> None:
        self.site = Site.parse(site) if isinstance(site, str) else site
        self.weights = torch.as_tensor(weights, dtype=torch.float32)
        self.bias, self.name, self.sites = bias, name, (self.site,)

    def values(self, logits: torch.Tensor, seen: Seen) -> torch.Tensor:
        """Of each token itself."""
        del logits
        vectors = seen[self.site].float()
        if vectors.shape[-1] != len(self.weights):
            raise InputError(
                "the probe is of other vectors", expected=f"{vectors.shape[-1]} weights", found=f"{len(self.weights)}"
            )
        return torch.sigmoid(vectors @ self.weights.to(vectors.device) + self.bias).double()


def _token(model: LiveModel, item: str | int) -> int:
    vocabulary = model.anatomy.vocabulary
    if isinstance(item, int):
        if vocabulary is not None and not 0 <= item < vocabulary:
            raise InputError(f"there is no token {item}", expected=f"0 to {vocabulary - 1}")
        return item
    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer", fix="give token ids")
    ids = model.tokenizer(item, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        pieces = [model.tokenizer.decode([i]) for i in ids]
        raise InputError(
            f"{item!r} is {len(ids)} tokens", expected="a text of one token", found=", ".join(map(repr, pieces)) or None,
            fix="name the first piece, or several tokens that stand for what you mean",
        )  # fmt: skip
    return int(ids[0])
