"""What a counterfactual decision has in common with the recorded one, summed token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.routing.balance.groups import Grouping
from moescope.routing.balance.router_scores import Floats32, Scoring
from moescope.routing.trace import Router, Trace

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Choose = Callable[[Floats32, Floats32, NDArray[np.int32]], Mask]

_NLL = """
    SELECT token, nll
    FROM tokens
    WHERE run_id = $run AND nll IS NOT NULL
    ORDER BY token
"""

# Columns of `Tally.sums`.
FIELDS = (
    "tokens",
    "experts",
    "none",
    "kept",
    "jaccard",
    "jaccard_shuffled",
    "mass",
    "recorded_mass",
    "with_nll",
    "nll",
    "nll_squared",
    "experts_with_nll",
    "experts_squared",
    "product",
)


@dataclass(frozen=True)
class Tally:
    """Sums of one router over tokens.

    Attributes:
        router: which.
        sums: field → [cell] sums; a cell is what one document has in one group.
        loads: [group, expert] tokens that go to the expert under the rule; `recorded` under the model's own decisions.
        sizes: [m] tokens with m experts.
    """

    router: Router
    sums: dict[str, Floats]
    loads: Floats
    recorded: Floats
    sizes: NDArray[np.int64]


class Tallies:
    """Adds up a router's chunks.

    Args:
        trace: the decisions.
        router: which.
        grouping: of tokens.
        rule: how its logits become scores.
        nll: [token] what `next_nll` gave.
        seed: of the shuffle that the Jaccard index is compared with.
    """

    def __init__(
        self, trace: Trace, router: Router, grouping: Grouping, rule: Scoring, nll: Floats, *, seed: int
    ) -> None:
        self._trace, self._router, self._grouping, self._rule, self._nll = trace, router, grouping, rule, nll
        self._generator = np.random.default_rng([seed, router.layer])
        groups, experts = len(grouping.names), router.n_experts
        self._sums = np.zeros((len(grouping.group_of), len(FIELDS)))
        self._loads, self._recorded = np.zeros((groups, experts)), np.zeros((groups, experts))
        self._sizes = np.zeros(experts + 1, np.int64)

    def add(self, rows: NDArray[np.int64], logits: Floats32, choose: Choose) -> None:
        """Compare the decisions of some tokens."""
        shares = self._rule.probabilities(logits)
        chosen = choose(logits, shares, self._trace.token_id[rows])
        experts = self._router.experts[rows].astype(np.intp)
        self._sums += self._grouping.sums(self._fields(rows, shares, chosen, experts), rows)
        cell = self._grouping.cell[rows]
        group = np.where(cell >= 0, self._grouping.group_of[cell], -1)
        for number in range(len(self._loads)):
            here = slice(None) if len(self._loads) == 1 and (group == 0).all() else group == number
            self._loads[number] += np.count_nonzero(chosen[here], axis=0)
            self._recorded[number] += np.bincount(experts[here].ravel(), minlength=self._router.n_experts)
        self._sizes += np.bincount(np.count_nonzero(chosen, axis=1)[cell >= 0], minlength=len(self._sizes))

    def done(self) -> Tally:
        """All of it."""
        sums = {name: self._sums[:, number] for number, name in enumerate(FIELDS)}
        return Tally(self._router, sums, self._loads, self._recorded, self._sizes)

    def _fields(self, rows: NDArray[np.int64], shares: Floats32, chosen: Mask, experts: NDArray[Any]) -> Floats:
        size = np.count_nonzero(chosen, axis=1).astype(np.float64)
        kept = np.take_along_axis(chosen, experts, 1).sum(1).astype(np.float64)
        other = experts[self._generator.permutation(len(experts))]
        shared = np.take_along_axis(chosen, other, 1).sum(1).astype(np.float64)
        top_k = experts.shape[1]
        nll = self._nll[rows]
        known = ~np.isnan(nll)
        nll = np.where(known, nll, 0.0)
        counted = np.where(known, size, 0.0)
        columns = {
            "tokens": np.ones(len(rows)),
            "experts": size,
            "none": (size == 0).astype(np.float64),
            "kept": kept,
            "jaccard": kept / (size + top_k - kept),
            "jaccard_shuffled": shared / (size + top_k - shared),
            "mass": np.einsum("te,te->t", shares, chosen, dtype=np.float64),
            "recorded_mass": np.take_along_axis(shares, experts, 1).sum(1, dtype=np.float64),
            "with_nll": known.astype(np.float64),
            "nll": nll,
            "nll_squared": nll**2,
            "experts_with_nll": counted,
            "experts_squared": counted**2,
            "product": counted * nll,
        }
        return np.stack([columns[name] for name in FIELDS], axis=1)


def next_nll(trace: Trace) -> Floats:
    """[token] NLL of the token that follows it, in nats: of the prediction made here; NaN where there is none."""
    found = trace.run.sql(_NLL).fetchnumpy()
    nll = np.full(trace.tokens, np.nan)
    known = np.ma.filled(found["token"], -1)
    if not len(known) or trace.tokens < 2:
        return nll
    follows = (trace.sequence[1:] == trace.sequence[:-1]) & (trace.position[1:] == trace.position[:-1] + 1)
    place = np.minimum(np.searchsorted(known, trace.token[1:]), len(known) - 1)
    here = follows & (known[place] == trace.token[1:])
    nll[:-1][here] = np.asarray(found["nll"], np.float64)[place[here]]
    return nll
