"""Verified rules for edits that need one: found once a model, refused where they do not reproduce its decisions."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np

from moescope.core.errors import InputError
from moescope.probes.anatomy import Sublayer
from moescope.probes.batches import Batch, Sequence
from moescope.probes.corpus import Document
from moescope.probes.live_model import LiveModel
from moescope.probes.routing_rule import BoundRule
from moescope.probes.rule_search import find_rules

Rules = dict[tuple[int, str], BoundRule]

EDITED = "_moescope_edits"  # attribute of a module that is being edited
_KEPT = "_moescope_rules"
_TOKENS, _LENGTH = 1024, 128


def rules_of(model: LiveModel) -> Rules:
    """The rule of every router that shows its logits, found on 1,024 random tokens the first time it is asked for."""
    found: Rules | None = vars(model).get(_KEPT)
    if found is None:
        if EDITED in vars(model.module):  # a session edits the passes of one thread only
            with ThreadPoolExecutor(1) as beside:
                found = beside.submit(find_rules, model, _random_batch(model)).result()
        else:
            found = find_rules(model, _random_batch(model))
        vars(model)[_KEPT] = found
    return found


def rule_for(model: LiveModel, s: Sublayer, use: Literal["choice", "weights"] = "choice") -> BoundRule:
    """The verified rule of one router.

    Args:
        model: whose router.
        s: which.
        use: `choice` where the rule has to choose experts, `weights` where it gives the weights of given ones.

    Raises:
        InputError: no rule that reproduces the router's decisions.
    """
    reason = why_no_rule(model, s, use)
    if reason is not None:
        raise InputError(
            f"the router of layer {s.layer} ({s.block}) cannot be edited by its rule",
            found=reason,
            fix="use edits that need no rule: Ablate(how='zero'), Scale, SwapExperts, SetRouting",
        )
    return rules_of(model)[s.layer, s.block]


def why_no_rule(model: LiveModel, s: Sublayer, use: Literal["choice", "weights"] = "choice") -> str | None:
    """Why a router's rule cannot be relied upon; None where it can."""
    if not s.has_logits:
        return "no module of it shows its logits"
    bound = rules_of(model).get((s.layer, s.block))
    if bound is None:
        return "its decisions were not seen"
    rule = bound.rule
    if use == "weights":
        return (
            None
            if rule.weights_fit
            else f"no known rule gives its weights (the nearest: {rule}, {_share(rule.weight_agreement)})"
        )
    if rule.choice == "hash":
        return "its experts come from a table of token ids"
    return (
        None
        if rule.verified
        else f"no known rule reproduces its decisions (the nearest: {rule}, {_share(rule.agreement)})"
    )


def _share(agreement: float) -> str:
    return f"{agreement:.1%} of tokens"


def _random_batch(model: LiveModel) -> Batch:
    length = min(_LENGTH, model.context or _LENGTH)
    rows = -(-_TOKENS // length)
    ids = np.random.default_rng(0).integers(0, model.anatomy.vocabulary, (rows, length))
    texts = [Document(text="") for _ in range(rows)]
    return Batch(0, tuple(Sequence(n, n, texts[n], 0, "", ids[n]) for n in range(rows)), 0)
