"""Cutting heads of a circuit, and all others, beside random heads: what is left of the difference between answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.core.intervention import Intervention
from moescope.probes.live_model import LiveModel
from moescope.probes.phenomena.head_map import HeadMap
from moescope.sae.circuits.head_outputs import HeadOutputs, at_mean, head_outputs, last_logits
from moescope.sae.circuits.prompts import Prompt

Floats = NDArray[np.float64]
CUT, KEEP, ALL = "circuit at its mean", "all other heads at their mean", "all heads at their mean"


@dataclass(frozen=True)
class Ablation:
    """Logit differences of held-out prompts.

    Attributes:
        names: of the conditions: base, the circuit cut, all else cut, everything cut, then random sets, cut and kept.
        interventions: of each, as made for the commonest length of prompt.
        value: [condition, prompt] logit difference.
    """

    names: tuple[str, ...]
    interventions: tuple[Intervention, ...]
    value: Floats


def means_of(
    model: LiveModel, negatives: Sequence[Prompt], outputs: HeadOutputs, positives: int, positions: str
) -> torch.Tensor:
    """[head, d_head] over the negatives, at their last tokens or at all."""
    if positions == "last":
        return outputs.last[positives:].mean(0)
    return head_outputs(model, negatives).mean


def ablated(
    model: LiveModel, test: list[Prompt], outputs: HeadOutputs, member: NDArray[np.bool_], means: torch.Tensor,
    positions: str, controls: int, seed: int, tick: Callable[[int], None],
) -> Ablation:  # fmt: skip
    """Logit differences of held-out prompts under every condition.

    Args:
        model: the live model.
        test: the prompts; of one without answers, the model's own best two tokens are meant.
        outputs: tells heads and widths.
        member: [head] whether it is of the circuit.
        means: [head, d_head] what heads then put out.
        positions: `last` or `all`.
        controls, seed: random sets of heads.
        tick: told tokens after every pass.
    """
    random = matched_sets(outputs.heads, member, controls=controls, seed=seed)
    every = np.ones_like(member)
    sets = [(CUT, member), (KEEP, ~member), (ALL, every)]
    sets += [(f"random heads at their mean, draw {n}", r) for n, r in enumerate(random)]
    sets += [(f"all but random heads at their mean, draw {n}", ~r) for n, r in enumerate(random)]

    def made(at: str) -> list[Intervention]:
        return [Intervention(), *(at_mean(outputs, heads, means, positions=at, name=name) for name, heads in sets)]

    value = np.zeros((len(sets) + 1, len(test)))
    answers: dict[int, tuple[list[int], list[int]]] = {}
    for which, number, logits in last_logits(model, test, made, positions=positions, progress=tick):
        prompt = test[number]
        if which == 0:
            best = [int(i) for i in logits.topk(2).indices]
            answers[number] = (list(prompt.answers) or best[:1], list(prompt.wrong) or best[1:])
        right, wrong = answers[number]
        value[which, number] = float(logits[right].logsumexp(0) - logits[wrong].logsumexp(0))
    lengths, times = np.unique([len(p.ids) for p in test], return_counts=True)
    common = int(lengths[times.argmax()])
    interventions = made(f"{common - 1}:{common}" if positions == "last" else "all")
    return Ablation(("base", *(name for name, _ in sets)), tuple(interventions), value)


def matched_sets(heads: HeadMap, member: NDArray[np.bool_], *, controls: int, seed: int) -> list[NDArray[np.bool_]]:
    """Random sets with as many heads in each layer as the circuit: of its other heads, and of all where those are too few."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(controls):
        drawn = np.zeros_like(member)
        for place in heads.places:
            columns = np.arange(heads.total)[heads.slices[place.layer, place.block]]
            count = int(member[columns].sum())
            others = columns[~member[columns]]
            drawn[random.choice(others if len(others) >= count else columns, count, replace=False)] = True
        found.append(drawn)
    return found
