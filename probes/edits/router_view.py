"""What a router would decide under edits of its logits and of its choice: collected step by step, decided once by its rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int

from moescope.probes.edits.step import Decision
from moescope.probes.routing_rule import BoundRule

Experts = Float[torch.Tensor, "token n_experts"]
Marks = Bool[torch.Tensor, "token n_experts"]
_RTOL, _ATOL = 1e-5, 1e-7  # what rounding alone may do to weights


@dataclass
class RouterView:
    """A router's logits and the limits on its choice; steps put new tensors in.

    Attributes:
        logits: the router's, edited.
        touched: tokens at which some edit acts; the others keep the model's own decision.
        barred: experts that may not be chosen.
        forced: experts that are chosen before any other.
        given: weights that experts have if they are chosen, NaN for those of the rule.
        ranks: which places of the order of preference fill the slots, −1 for none; None for the first k everywhere.
        as_given: whether experts may have been barred, and nothing else has been asked.
        narrow: whether all tokens have as many slots as `ranks` has columns, so that there need be no more.
    """

    logits: Experts
    touched: Bool[torch.Tensor, " token"]
    barred: Marks | None = None
    forced: Marks | None = None
    given: Experts | None = None
    ranks: Int[torch.Tensor, "token k"] | None = None
    narrow: bool = False
    as_given: bool = True

    def bar(self, marks: Marks) -> None:
        """Take experts out of the choice."""
        self.barred = marks if self.barred is None else self.barred | marks

    def force(self, marks: Marks) -> None:
        """Put experts before all others."""
        self.forced = marks if self.forced is None else self.forced | marks
        self.as_given = False


def view_of(decision: Decision, rule: BoundRule) -> RouterView:
    """The view before any edit, in the type in which the rule computes."""
    assert decision.logits is not None
    logits = decision.logits.float() if rule.rule.dtype == "float32" else decision.logits
    return RouterView(logits, torch.zeros(len(logits), dtype=torch.bool, device=logits.device))


def preference(rule: BoundRule, view: RouterView, logits: Experts) -> Experts:
    """What the router takes its top-k of: its selection scores, minus infinity for barred experts, infinity for forced ones.

    Args:
        rule: the router's.
        view: with the limits on its choice.
        logits: the view's, minus infinity where an expert is barred.
    """
    barred = view.barred
    if barred is None:
        found = rule.selection(logits)
    else:
        # Groups are limited by scores with the bias: a barred expert must be worth nothing there too.
        found = replace(rule, vector=_barring(rule.vector, barred)).selection(logits)
        if not _by_logits(rule):
            found = torch.where(barred, -torch.inf, found)
    return found if view.forced is None else torch.where(view.forced, torch.inf, found)


def settle(rule: BoundRule, view: RouterView, decision: Decision) -> None:
    """Let the rule decide on a view, and put into `decision` what differs from what it decides without edits.

    Tokens for which the rule comes to the same experts and weights as without the edits keep the model's own ids and weights,
    bit for bit. Those that keep their experts and get other weights keep their slots.
    """
    assert decision.logits is not None
    if view.barred is not None and view.as_given and rule.rule.groups is None:
        _settle_barred(rule, view, decision)
        return
    own, weights = decision.ids, decision.weights
    k = own.shape[1]
    logits = view.logits if view.barred is None else torch.where(view.barred, -torch.inf, view.logits)
    scores = preference(rule, view, logits)
    if view.ranks is None:
        width, ids = k, scores.topk(k, dim=-1).indices
        filled = scores.gather(-1, ids) > -torch.inf
    else:
        width = view.ranks.shape[1] if view.narrow else max(k, view.ranks.shape[1])
        ids, filled = _ranked(scores, view.ranks, width)
    found = rule.weights(logits, _or_none(ids, filled, logits))
    if view.given is not None:
        given = view.given.gather(-1, ids)
        found = torch.where(given.isnan() | ~filled, found, given)
    same = torch.zeros_like(view.touched)
    if width == k:
        depth = k if view.ranks is None else logits.shape[-1]  # ties fall as they did above
        before = rule.selection(decision.logits).topk(depth, dim=-1).indices[:, :k]
        full = filled.all(-1)
        same_as_own = _same_set(ids, own) & full
        inside = own < logits.shape[-1]
        again = rule.weights(logits, own)  # in the slots that the model has
        if view.given is not None:
            given = view.given.gather(-1, torch.where(inside, own, 0))
            again = torch.where(given.isnan() | ~inside, again, given)
        unchanged = torch.isclose(again, rule.weights(decision.logits, own), rtol=_RTOL, atol=_ATOL).all(-1)
        # A near-tie that the rule decides otherwise than the model did is no change either.
        same = _same_set(ids, before) & full & unchanged
        ids = torch.where(same_as_own[:, None], own, ids)
        found = torch.where(same_as_own[:, None], again, found)
    own, weights = _widened(own, weights, rule.selection(decision.logits), width)
    change = (view.touched & ~same)[:, None]
    decision.ids = torch.where(change, ids, own)
    decision.weights = torch.where(change, found.to(weights.dtype), weights)
    decision.logits = torch.where(change, logits, decision.logits)


def _settle_barred(rule: BoundRule, view: RouterView, decision: Decision) -> None:
    """The same where experts are barred and nothing else is asked: who has none of them keeps what it has."""
    assert view.barred is not None
    own, n = decision.ids, view.logits.shape[-1]
    inside = own < n
    hit = (view.barred.gather(-1, torch.where(inside, own, 0)) & inside).any(-1, keepdim=True)
    logits = torch.where(view.barred, -torch.inf, view.logits)
    scores = preference(rule, view, logits)
    ids = scores.topk(own.shape[1], dim=-1).indices
    filled = scores.gather(-1, ids) > -torch.inf
    ids, filled = torch.where(hit, ids, own), filled | ~hit
    found = rule.weights(logits, _or_none(ids, filled, logits))
    change = view.touched[:, None] & hit
    shared = rule.rule.score == "softmax" and not rule.rule.renormalise
    if shared or rule.rule.score == "sparsemixer":  # the share of a barred expert goes to all others
        same = torch.isclose(found, rule.weights(view.logits, own), rtol=_RTOL, atol=_ATOL).all(-1, keepdim=True)
        change = view.touched[:, None] & (hit | ~same)
    decision.ids = torch.where(change, ids, own)
    decision.weights = torch.where(change, found.to(decision.weights.dtype), decision.weights)
    decision.logits = torch.where(view.touched[:, None], logits, view.logits)


def _by_logits(rule: BoundRule) -> bool:
    """Whether the router takes its top-k of numbers that are minus infinity where a logit is."""
    r = rule.rule
    plain = r.score == "softmax" and not r.bias and not r.groups and r.dtype == "float32"
    return (r.choice == "logits" or r.score == "sparsemixer" or plain) and not r.groups


def _ranked(
    scores: Experts, ranks: Int[torch.Tensor, "token k"], width: int
) -> tuple[Int[torch.Tensor, "token width"], Bool[torch.Tensor, "token width"]]:
    """Experts by rank, and which slots are filled; the others hold experts of no other slot, with nothing to do."""
    n = scores.shape[-1]
    order = scores.topk(n, dim=-1).indices
    wanted = ranks >= 0
    at = torch.where(wanted, ranks, 0)
    taken = torch.zeros_like(scores, dtype=torch.bool)
    place = torch.arange(n, device=scores.device)
    taken = (place[None, None, :] == torch.where(wanted, ranks, -1)[:, :, None]).any(1)
    rest = torch.where(taken, n, place).sort(-1).values  # ranks that nobody asked for, in order
    if width > ranks.shape[1]:
        pad = ranks.new_full((len(ranks), width - ranks.shape[1]), -1)
        wanted = torch.cat([wanted, pad >= 0], 1)
        at = torch.cat([at, pad], 1)
    spare = (~wanted).long().cumsum(-1) - 1
    at = torch.where(wanted, at, rest.gather(-1, spare.clamp(min=0, max=n - 1)).clamp(max=n - 1))
    ids = order.gather(-1, at)
    return ids, wanted & (scores.gather(-1, ids) > -torch.inf)


def _widened(
    ids: torch.Tensor, weights: torch.Tensor, scores: Experts, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Own slots, and after them the next choices with weight 0; or the first of them, where fewer are kept."""
    k = ids.shape[1]
    if width <= k:
        return ids[:, :width], weights[:, :width]
    inside = torch.where(ids < scores.shape[-1], ids, 0)
    more = scores.scatter(-1, inside, -torch.inf).topk(width - k, dim=-1).indices
    return torch.cat([ids, more], 1), torch.cat([weights, weights.new_zeros(len(more), width - k)], 1)


def _or_none(ids: torch.Tensor, filled: torch.Tensor, logits: Experts) -> torch.Tensor:
    return torch.where(filled, ids, logits.shape[-1])


def _same_set(one: torch.Tensor, other: torch.Tensor) -> Bool[torch.Tensor, " token"]:
    return (one.sort(-1).values == other.sort(-1).values).all(-1)


def _barring(vector: Callable[[str], torch.Tensor], barred: Marks) -> Callable[[str], torch.Tensor]:
    """A router's vectors with minus infinity at barred experts; it is asked for the bias alone."""

    def read(name: str) -> torch.Tensor:
        return torch.where(barred, -torch.inf, vector(name).to(barred.device).float())

    return read
