"""The routers that a counterfactual rule is tried on, and the rule made ready for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.routing.balance.router_scores import (
    CHUNK,
    Floats32,
    Scoring,
    logit_chunks,
    logit_sample,
    scored_routers,
    scoring,
)
from moescope.routing.trace import Router, Trace

if TYPE_CHECKING:
    from moescope.routing.counterfactuals.assignments import AssignmentRule
    from moescope.routing.counterfactuals.thresholds import ThresholdRule

RuleName = Literal["top_p", "ratio", "gap", "null", "expert_choice", "balanced", "grouped", "hash"]
THRESHOLD = ("top_p", "ratio", "gap", "null")

# Share of sampled decisions that the stored logits must give back: what is left is ties and narrower types.
ENOUGH = 0.99
# Thresholds are tuned on as many scores as fit into this, of all routers together.
SAMPLED_SCORES = 8_000_000
_LEAST_SAMPLE, _LARGEST_SAMPLE = 512, 8192


@dataclass(frozen=True)
class RuleSettings:
    """The parameters of a rule.

    Attributes:
        name: which rule.
        value: its threshold; None to tune it.
        tune: one threshold for all routers, or one for each.
        window: tokens routed together; `windows` of them are solved, for `balanced`.
        slots, nulls: of `null`; None for the defaults.
        seed: of the hash table.
    """

    name: RuleName
    value: float | None
    tune: Literal["model", "layer"]
    window: int
    windows: int
    slots: int | None
    nulls: int | None
    seed: int


@dataclass(frozen=True)
class Asked:
    """One router and the rule tried on it.

    Attributes:
        router: which.
        scoring: how its logits become scores.
        sample: [token, expert] logits of some of its tokens.
        rule: the rule; `limit` its threshold, where it has one.
    """

    router: Router
    scoring: Scoring
    sample: Floats32
    rule: ThresholdRule | AssignmentRule | None = None
    limit: float | None = None

    def choose(self, logits: Floats32, shares: Floats32, token_id: NDArray[np.int32]) -> NDArray[np.bool_]:
        """[token, expert] what the rule would choose."""
        rule: Any = self.rule
        last = token_id if self.limit is None else self.limit
        chosen: NDArray[np.bool_] = rule.choose(logits, shares, last)
        return chosen

    def chunks(self, trace: Trace, settings: RuleSettings) -> Iterator[tuple[NDArray[np.int64], Floats32]]:
        """The tokens that the rule is tried on, and their logits."""
        window = settings.window
        if settings.name == "balanced":
            starts = window_starts(trace, window, settings.windows)
            return logit_chunks(trace, self.router, chunk=window, starts=starts)
        together = window if settings.name == "expert_choice" else 1
        return logit_chunks(trace, self.router, chunk=max(1, CHUNK // together) * together)


def window_starts(trace: Trace, window: int, windows: int) -> list[int]:
    """First rows of at most so many windows spread over the run; the last, shorter one only if all are taken."""
    whole = trace.tokens // window
    count = whole if whole >= windows else -(-trace.tokens // window)
    spread = np.unique(np.linspace(0, count - 1, min(windows, count)).astype(np.int64))
    return [int(number) * window for number in spread]


def asked_routers(trace: Trace, settings: RuleSettings, *, any_router: bool) -> tuple[list[Asked], tuple[str, ...]]:
    """The routers with their rules tuned, and what must be said of routers left out.

    Raises:
        InputError: no router has logits, or none whose decisions follow from them; or a parameter that does not fit.
    """
    found, notes = followed_routers(trace, any_router=any_router)
    return with_rule(found, settings), notes


def with_rule(found: list[Asked], settings: RuleSettings) -> list[Asked]:
    """The same routers, with a rule and its threshold."""
    ready = [replace(asked, rule=_rule(settings, asked.router)) for asked in found]
    return _tuned(ready, settings) if settings.name in THRESHOLD else ready


def followed_routers(trace: Trace, *, any_router: bool) -> tuple[list[Asked], tuple[str, ...]]:
    """Routers whose logits give back their decisions, or all; and what must be said of the others.

    Raises:
        InputError: no router has logits, or none whose decisions follow from them.
    """
    routers = scored_routers(trace)
    share = SAMPLED_SCORES // sum(router.n_experts for router in routers)
    step = max(1, -(-trace.tokens // min(max(share, _LEAST_SAMPLE), _LARGEST_SAMPLE)))
    places: list[Asked] = []
    kept: dict[str, float] = {}
    refused: dict[str, float] = {}
    for router in routers:
        rows, logits = logit_sample(trace, router, step=step)
        if not len(rows):
            continue
        rule = scoring(trace, router)
        agreement = float(rule.reproduces(logits, router.experts[rows]).mean())
        taken = agreement >= ENOUGH or any_router or not rule.stored
        if taken:
            places.append(Asked(router, rule, logits))
        if agreement < ENOUGH:
            (kept if taken else refused)[router.name] = agreement
    if not places:
        raise InputError(
            f"the decisions of run {trace.run.name!r} do not follow from its stored logits",
            found=f"decisions that are the top-k of the scores: {_worst(refused)}" if refused else "no whole logits",
            fix="pass any_router=True to compare all the same: routers choose by a bias, a table, or under an edit, which "
            "logits do not hold",
        )
    notes: tuple[str, ...] = ()
    if len(routers) < len(trace.routers):
        notes += (f"{len(trace.routers) - len(routers)} routers have no logits and are left out.",)
    for group, how in ((refused, "are left out"), (kept, "are taken in all the same")):
        if group:
            notes += (f"Routers whose decisions are not the top-k of their scores {how}: {_worst(group)}.",)
    return places, notes


def _worst(agreements: dict[str, float]) -> str:
    """The routers that agree least, and in what share of tokens."""
    listed = sorted(agreements.items(), key=lambda item: item[1])
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(f"{name} {share:.0%}" for name, share in listed[:3]) + more


def _rule(settings: RuleSettings, router: Router) -> ThresholdRule | AssignmentRule:
    from moescope.routing.counterfactuals import assignments, thresholds

    top_k, window = router.top_k, settings.window
    made: dict[str, Callable[[], ThresholdRule | AssignmentRule]] = {
        "top_p": thresholds.TopP,
        "ratio": thresholds.Ratio,
        "gap": thresholds.Gap,
        "null": lambda: thresholds.NullExperts(*_slots(settings, router)),
        "expert_choice": lambda: assignments.ExpertChoice(top_k, window),
        "balanced": lambda: assignments.Balanced(top_k, window),
        "grouped": lambda: assignments.Grouped(top_k),
        "hash": lambda: assignments.Hash(top_k, settings.seed),
    }
    return made[settings.name]()


def _slots(settings: RuleSettings, router: Router) -> tuple[int, int]:
    """Slots and null experts of `null`."""
    slots = min(2 * router.top_k, router.n_experts) if settings.slots is None else settings.slots
    if not router.top_k <= slots <= router.n_experts:
        limits = f"slots from its k = {router.top_k} to its E = {router.n_experts}"
        raise InputError(f"slots = {slots} does not fit router {router.name}", expected=limits)
    return slots, slots if settings.nulls is None else settings.nulls


def _tuned(found: list[Asked], settings: RuleSettings) -> list[Asked]:
    """The same with limits: given, or such that the sampled tokens have k experts on average."""
    from moescope.routing.counterfactuals.thresholds import tuned_limit

    if settings.value is not None:
        return [replace(asked, limit=asked.rule.limit(settings.value)) for asked in found]  # type: ignore[union-attr]  # only rules with a limit come here
    ready = []
    for part in [found] if settings.tune == "model" else [[asked] for asked in found]:
        rules: list[Any] = [asked.rule for asked in part]
        costs = [
            rule.costs(asked.sample, asked.scoring.probabilities(asked.sample)).ravel()
            for rule, asked in zip(rules, part, strict=True)
        ]
        limit = tuned_limit(np.concatenate(costs), sum(len(asked.sample) * asked.router.top_k for asked in part))
        ready += [replace(asked, limit=limit) for asked in part]
    return ready
