"""Edits of routers and experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moescope.core.edit import Edit, edit
from moescope.core.errors import InputError

_SUM = 1e-3  # how far from 1 probabilities may sum

How = Literal["zero", "route_around", "renormalise", "mean", "copy"]


def as_tuple(experts: object) -> tuple[int, ...]:
    """One id, or several in any sequence, as a tuple without doubles."""
    found = (experts,) if isinstance(experts, int) else tuple(int(e) for e in experts)  # type: ignore[attr-defined]  # a sequence
    return tuple(dict.fromkeys(found))


def refuse(edit: Edit, field: str, expected: str) -> InputError:
    """The refusal of a field's value."""
    return InputError(f"{edit.kind}: {field} cannot be {getattr(edit, field)!r}", expected=expected)


@dataclass(frozen=True, kw_only=True)
class ExpertEdit(Edit):
    """An edit at a router and its experts.

    Attributes:
        block: which router of a layer, as in sites.
    """

    block: str = "mlp"


@dataclass(frozen=True, kw_only=True)
class OfExperts(ExpertEdit):
    """An edit of some experts of each of its layers.

    Attributes:
        experts: ids in 0 … n_experts − 1 (with null experts, these too).
    """

    experts: Sequence[int] | int = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "experts", as_tuple(self.experts))
        if not self.ids or min(self.ids) < 0:
            raise refuse(self, "experts", "one or more expert ids, from 0 on")

    @property
    def ids(self) -> tuple[int, ...]:
        """The experts, as a tuple."""
        return as_tuple(self.experts)


@edit("ablate")
@dataclass(frozen=True, kw_only=True)
class Ablate(OfExperts):
    """Take experts out.

    Attributes:
        how: `zero`: a chosen expert keeps its slot and its weight counts for the others as before, its contribution is zero (a
            zeroed down projection); `renormalise`: the same, and the other slots of the token are scaled up so that the sum of
            weights stays; `route_around`: the router cannot choose it and takes its next choice, by its own rule; `mean`: its
            contribution is weight · its mean output (`means`); `copy`: its contribution is weight · what it was given.
        means: for `mean`, one vector of d_model an expert, in the order of `experts`; `ms.effect` calibrates them where left out,
            `model.edited` and `ms.record` need them.
    """

    how: How = "zero"
    means: Sequence[Sequence[float]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.means is not None and (self.how != "mean" or len(self.means) != len(self.ids)):
            raise InputError(
                "ablate: means belong to how='mean', one vector an expert",
                found=f"how={self.how!r}, {len(self.means)} vectors for {len(self.ids)} experts",
            )


@edit("force")
@dataclass(frozen=True, kw_only=True)
class Force(OfExperts):
    """Experts every token takes: their selection scores are raised over the largest (at most k an edit).

    Attributes:
        weight: weight each of them is given; None for what the router's rule gives to experts whose log-probability is the
            token's largest plus 0.01 (SteerMoE, arXiv 2509.09660).
    """

    weight: float | None = None


@edit("bias")
@dataclass(frozen=True, kw_only=True)
class Bias(OfExperts):
    """Add a number to the router logits of experts; the decision follows by the router's own rule.

    Attributes:
        value: in units of logits.
    """

    value: float = 0.0


@edit("scale")
@dataclass(frozen=True, kw_only=True)
class Scale(OfExperts):
    """Multiply the routing weights of experts, after the choice and without renormalising (RICE, arXiv 2505.14681).

    Attributes:
        factor: 1 changes nothing.
    """

    factor: float = 1.0


@edit("keep")
@dataclass(frozen=True, kw_only=True)
class Keep(OfExperts):
    """Route among these experts only, by the router's own rule."""


@edit("set_routing")
@dataclass(frozen=True, kw_only=True)
class SetRouting(ExpertEdit):
    """Give the experts the decisions of a recorded run of the same texts.

    Attributes:
        run: name of the run, with the records of probe `routing`; `model.edited(…, sources={name: run})` needs the `Run`,
            `ms.effect` finds it in its store.
        weights: whose weights: `recorded`, or `own`, those that the router's rule gives to the recorded experts.
    """

    run: str = ""
    weights: Literal["recorded", "own"] = "recorded"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.run:
            raise refuse(self, "run", "the name of a run")


@edit("mix_routing")
@dataclass(frozen=True, kw_only=True)
class MixRouting(ExpertEdit):
    """Mix the router's probabilities with given ones: (1 − share) · own + share · reference (C3PO, arXiv 2504.07964).

    The decision follows by the router's own rule, with the mixture for its scores. Where scores are no probabilities (a
    sigmoid for each expert), their shares of their sum are mixed, and the sum stays; no score comes to 1.

    Attributes:
        reference: probabilities of the layer's experts, n_experts numbers that sum to 1 (with null experts, these too).
        share: of the reference, 0 to 1.
    """

    reference: Sequence[float] = ()
    share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share <= 1:
            raise refuse(self, "share", "0 to 1")
        if not self.reference or min(self.reference) < 0 or abs(sum(self.reference) - 1) > _SUM:
            raise InputError(
                "mix_routing: reference is no distribution",
                expected="numbers from 0 on that sum to 1, one an expert",
                found=f"{len(self.reference)} numbers that sum to {sum(self.reference):g}",
            )


@edit("top_k")
@dataclass(frozen=True, kw_only=True)
class TopK(ExpertEdit):
    """Another number of experts a token: the k largest, weights by the router's own rule.

    Attributes:
        k: 1 … n_experts.
    """

    k: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise refuse(self, "k", "1 or more")


@edit("rank_routing")
@dataclass(frozen=True, kw_only=True)
class RankRouting(ExpertEdit):
    """Only the experts of given ranks: 1 is the router's first choice, 2 its second, …; weights by the router's own rule over
    those (the weak routing of SCMoE, arXiv 2405.14507).

    Attributes:
        ranks: 1-based, distinct, at most n_experts.
    """

    ranks: Sequence[int] | int = (2,)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "ranks", as_tuple(self.ranks))
        if not self.ranks or min(as_tuple(self.ranks)) < 1:
            raise refuse(self, "ranks", "one or more ranks, from 1 on")


@edit("top_p")
@dataclass(frozen=True, kw_only=True)
class TopP(ExpertEdit):
    """As few experts a token as reach a share p of its scores, at most those it had; the others' weights are zero.

    Attributes:
        p: over 0, up to 1.
        renormalise: scale the kept weights so that the token's sum of weights stays.
    """

    p: float = 1.0
    renormalise: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p <= 1:
            raise refuse(self, "p", "over 0, up to 1")


@edit("random_routing")
@dataclass(frozen=True, kw_only=True)
class RandomRouting(ExpertEdit):
    """k experts at random for every token, without repetition; the weights of the token's own slots stay in their order.

    Attributes:
        seed: the same seed, text and place give the same experts.
    """

    seed: int = 0


@edit("swap_experts")
@dataclass(frozen=True, kw_only=True)
class SwapExperts(ExpertEdit):
    """Slots of one expert go to the other and the reverse, weights as they are.

    Attributes:
        first, second: the two experts.
    """

    first: int = 0
    second: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.first, self.second) < 0:
            raise InputError("swap_experts: expert ids count from 0", found=f"{self.first} and {self.second}")


@edit("fake_quant")
@dataclass(frozen=True, kw_only=True)
class FakeQuant(OfExperts):
    """Round the weights of experts to few bits: symmetric, one scale an output row (round to nearest).

    Attributes:
        bits: 2 to 8.
    """

    bits: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.bits <= 8:
            raise refuse(self, "bits", "2 to 8")
