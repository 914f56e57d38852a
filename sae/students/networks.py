"""Students: a dense MLP, and one whose neurons are partly chosen by a router."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import nn
from torch.nn import functional as F

from moescope.core.errors import InputError

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"gelu": F.gelu, "relu": F.relu}
_SMALL = 0.01  # of first output weights: what an expert says before it has learnt anything is noise to the others


class DenseStudent(nn.Module):
    """`y = V σ(W x + b) + c`.

    Args:
        width_in, width_out: components of input and output.
        neurons: rows of W.
        activation: σ, a name of `ACTIVATIONS`.
        seed: of its first weights.

    Example:
        >>> DenseStudent(4, 4, 3).active_parameters
        31
    """

    def __init__(self, width_in: int, width_out: int, neurons: int, *, activation: str = "gelu", seed: int = 0) -> None:
        super().__init__()
        draw = _Draw(seed)
        self.activation = ACTIVATIONS[activation]
        self.w = nn.Parameter(draw(neurons, width_in) / math.sqrt(width_in))
        self.b = nn.Parameter(torch.zeros(neurons))
        self.v = nn.Parameter(draw(neurons, width_out) * _SMALL)
        self.c = nn.Parameter(torch.zeros(width_out))

    def forward(self, x: Float[torch.Tensor, "vector width_in"]) -> Float[torch.Tensor, "vector width_out"]:
        """Outputs."""
        out: torch.Tensor = self.activation(F.linear(x, self.w, self.b)) @ self.v + self.c
        return out

    @property
    def active_parameters(self) -> int:
        """Parameters that work on one token: all of them."""
        return sum(p.numel() for p in self.parameters())


class ExpertStudent(nn.Module):
    """Half its active neurons shared, the other half the best of many single-neuron experts, weighted by a softmax over those.

    `y = V σ(W x + b) + c + Σ_{e in top-k} softmax_k(r(x))_e · v_e σ(w_e x + b_e)`, where r is linear, or of low rank: U (Vᵀ x).

    Args:
        width_in, width_out: components of input and output.
        active: neurons at work on a token; half of them are shared, rounded down.
        experts: single-neuron experts to choose from.
        router_rank: rank of the router; None for full.
        examples: [example, width_in] inputs; each expert's router row and input weights start in the direction of one of them.
        activation: σ, a name of `ACTIVATIONS`.
        seed: of its first weights.

    Raises:
        InputError: more experts to choose than there are.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        active: int,
        *,
        experts: int,
        router_rank: int | None = None,
        examples: Float[torch.Tensor, "example width_in"] | None = None,
        activation: str = "gelu",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.k = active - active // 2
        if not 0 < self.k <= experts:
            raise InputError(
                f"{self.k} experts cannot be chosen", expected=f"1 to {experts}", fix="raise experts or lower active"
            )
        draw = _Draw(seed + 1)
        self.activation = ACTIVATIONS[activation]
        self.shared = DenseStudent(width_in, width_out, active // 2, activation=activation, seed=seed)
        rows = draw(experts, width_in)
        if examples is not None:
            rows[: len(examples)] = examples[:experts]
        self.w = nn.Parameter(F.normalize(rows, dim=1))
        self.b = nn.Parameter(torch.zeros(experts))
        self.v = nn.Parameter(draw(experts, width_out) * _SMALL)
        if router_rank is None:
            self.router = nn.Parameter(F.normalize(rows, dim=1))
            self.key = None
        else:
            self.key = nn.Parameter(draw(router_rank, width_in) / math.sqrt(width_in))
            self.router = nn.Parameter(F.normalize(rows @ self.key.detach().T, dim=1))

    def chosen(
        self, x: Float[torch.Tensor, "vector width_in"]
    ) -> tuple[Float[torch.Tensor, "vector k"], Int[torch.Tensor, "vector k"]]:
        """Weights and ids of the experts chosen for each input, largest first."""
        logits = F.linear(x if self.key is None else F.linear(x, self.key), self.router)
        top, ids = logits.topk(self.k, dim=-1)
        return top.softmax(-1), ids

    def forward(self, x: Float[torch.Tensor, "vector width_in"]) -> Float[torch.Tensor, "vector width_out"]:
        """Outputs. All experts are computed, and those not chosen weighted by 0: on a CPU faster than gathering them."""
        weights, ids = self.chosen(x)
        neurons = self.activation(F.linear(x, self.w, self.b))
        gates = torch.zeros_like(neurons).scatter(1, ids, weights)
        out: torch.Tensor = self.shared(x) + (neurons * gates) @ self.v
        return out

    @property
    def active_parameters(self) -> int:
        """Parameters that work on one token: shared neurons, the router with its rows for every expert, the chosen experts."""
        router = self.router.numel() + (0 if self.key is None else self.key.numel())
        one = self.w.shape[1] + 1 + self.v.shape[1]
        return self.shared.active_parameters + router + self.k * one


def dense_neurons(parameters: int, width_in: int, width_out: int) -> int:
    """Neurons of the dense student that has about so many parameters, at least 1.

    Example:
        >>> dense_neurons(DenseStudent(4, 4, 3).active_parameters, 4, 4)
        3
    """
    return max(1, round((parameters - width_out) / (width_in + width_out + 1)))


class _Draw:
    """Normal draws from one seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator)
