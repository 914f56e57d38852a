"""What can be wrong with recorded decisions, each told with what it means and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.sites import EXPERT_INDICES, ROUTER_LOGITS
from moescope.probes.anatomy import Sublayer
from moescope.probes.routing_rule import ENOUGH, RoutingRule

_ENOUGH_ROWS = 8
_NO_SLOT = np.int32(-(1 << 20))
_PROBABILITIES = (
    "every row is non-negative and sums to 1: these are probabilities, not logits; entropies and margins of this router "
    "mean something else, and only experts and weights are to be used"
)


def faults_of_ids(ids: NDArray[np.int32], weights: NDArray[np.float32], s: Sublayer) -> Iterator[str]:
    """What is wrong with the experts and weights [token, k] of one router."""
    if not len(ids):
        return
    low, high, choices = int(ids.min()), int(ids.max()), s.n_choices
    if low < 0 or high >= choices:
        cause = (
            "the first id too many marks slots that another device computes: record without expert parallelism"
            if low >= 0 and high == s.n_experts
            else "another tensor was read than the decision: run `moescope doctor` on this model"
        )
        yield f"expert ids run from {low} to {high}, but the layer has {choices} (0 to {choices - 1}): {cause}"
    if not np.isfinite(weights).all():
        yield (
            "some weights are NaN or infinite: the model overflows on this text; record it in another dtype "
            "(float32, bfloat16), or look at what goes into this layer"
        )
    if twice := _same_expert_twice(ids, weights):
        yield (
            f"{twice:,} tokens of a batch were given the same expert twice: its load is counted twice, and the model "
            "takes fewer experts than it says; check the router"
        )


def faults_of_logits(finite: NDArray[np.bool_], like_probabilities: NDArray[np.bool_]) -> Iterator[str]:
    """What is wrong with the logits of one step, given for each token whether they are finite and look like shares."""
    if not finite.all():
        yield (
            "some router logits are NaN or infinite: the model overflows on this text; record it in another dtype "
            "(float32, bfloat16), or look at what goes into this layer"
        )
    if len(like_probabilities) >= _ENOUGH_ROWS and like_probabilities.all():
        yield _PROBABILITIES


def rule_faults(counts: Counter[str], rule: RoutingRule | None) -> Iterator[tuple[str, str]]:
    """What the whole run shows of one router: (the site's tensor, the fault).

    Args:
        counts: `tokens` in all, `like_probabilities` among them; of the `ruled` ones, how many have the `same_set` of
            experts as the rule gives, and the `same` weights as well.
        rule: the rule that was found on the first sequences.
    """
    if counts["tokens"] and counts["like_probabilities"] == counts["tokens"]:
        yield ROUTER_LOGITS, _PROBABILITIES  # also where every step was too short to tell
    if rule is None or not counts["ruled"]:
        return
    reproduced = counts["same"] if rule.verified else counts["same_set"]
    if reproduced < ENOUGH * counts["ruled"]:
        what = "decisions" if rule.verified else "choices of experts"
        yield (
            EXPERT_INDICES,
            f"the rule that held on the first sequences ({rule}) gives {reproduced / counts['ruled']:.2%} of the run's "
            f"{counts['ruled']:,} {what}: experts and weights are those that the model used, but something else decided "
            "them; do not rely on margins or on what computes with the rule",
        )


def _same_expert_twice(ids: NDArray[np.int32], weights: NDArray[Any]) -> int:
    """Tokens with two slots of weight that went to one expert."""
    if ids.shape[1] < 2:
        return 0
    counted = np.sort(np.where(weights == 0, _NO_SLOT - np.arange(ids.shape[1], dtype=np.int32), ids), axis=1)
    return int((counted[:, 1:] == counted[:, :-1]).any(axis=1).sum())
