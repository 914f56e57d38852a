"""The rules that call an expert a super expert, each as published or released."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moescope.routing.phenomena.expert_outputs import ExpertOutputs

RULES: Mapping[str, str] = {
    "paper": "a > P(A) and a > fraction × max(A), in layers whose block forms massive activations; A: all experts of the model "
    "(arXiv 2507.23279, Eq. 6)",
    "paper, A of forming layers": "as paper, A: the experts of those layers alone (Algorithm 1)",
    "released": "a > P(A) and a > max(A) // (1 ÷ fraction), floor division; A and candidates: layers below round(share × layers) "
    "(the authors' code)",
    "REAP": "a > max(P(A), fraction × max(A)); A: all experts; candidates: the first ⌊share × M⌋ of the M layers with experts (the "
    "code of REAP, which takes the signed maximum where the record has |·|)",
}


@dataclass
class Ruled:
    """What one rule says of every expert.

    Attributes:
        rule: its name in `RULES`.
        layers: layers in which an expert may be a super expert.
        in_a: [expert] whether its output is in A.
        percentile, fraction: the two thresholds.
        chosen: [expert] whether it is a super expert.
    """

    rule: str
    layers: list[int]
    in_a: NDArray[np.bool_]
    percentile: float
    fraction: float
    chosen: NDArray[np.bool_]

    @property
    def threshold(self) -> float:
        """The larger of the two: what an expert in those layers must exceed."""
        return max(self.percentile, self.fraction)


def judge(
    outputs: ExpertOutputs,
    rule: str,
    *,
    percentile: float,
    fraction: float,
    share: float,
    without: NDArray[np.bool_] | None = None,
) -> Ruled | None:
    """Hold every expert against a rule; None where its layers are not known, or where it has no expert to look at.

    The percentile is the linearly interpolated one, and both comparisons are strict: with fewer than 1 ÷ (1 − percentile)
    experts, 200 at P99.5, it lies between the two largest, so that one expert at most can pass.

    Args:
        outputs: of the experts.
        rule: a name in `RULES`.
        percentile: of A, in percent.
        fraction: of the largest in A.
        share: of the layers that count as early ones, where the rule has such.
        without: [expert] left out of A and of the candidates.
    """
    layers = _layers(outputs, rule, share)
    if layers is None:
        return None
    frame = outputs.frame
    value = frame["value"].to_numpy(np.float64)
    eligible = frame["layer"].isin(layers).to_numpy()
    inside = eligible if rule in ("paper, A of forming layers", "released") else np.ones(len(frame), np.bool_)
    left = np.ones(len(frame), np.bool_) if without is None else ~without
    inside = inside & left
    if not inside.any():
        return None
    at_percentile = float(np.percentile(value[inside], percentile))
    largest = float(value[inside].max())
    at_fraction = largest // (1 / fraction) if rule == "released" else largest / (1 / fraction)
    chosen = eligible & left & (value > at_percentile) & (value > at_fraction)
    return Ruled(rule, layers, inside, at_percentile, at_fraction, chosen)


def why_not(ruled: Ruled, row: pd.Series) -> str:
    """Which tests an expert does not pass, in words; empty for a super expert."""
    failed = []
    if int(row["layer"]) not in ruled.layers:
        failed.append("layer")
    if not row["value"] > ruled.percentile:
        failed.append("percentile")
    if not row["value"] > ruled.fraction:
        failed.append("fraction")
    return ", ".join(failed)


def first_layers(share: float, n_layers: int) -> int:
    """How many layers the released code looks at: Python's rounding, halves to the even number.

    Example:
        >>> first_layers(0.75, 48), first_layers(0.75, 6)
        (36, 4)
    """
    return round(share * n_layers)


def _layers(outputs: ExpertOutputs, rule: str, share: float) -> list[int] | None:
    moe: Sequence[int] = outputs.moe_layers
    if rule == "released":
        return [layer for layer in moe if layer < first_layers(share, outputs.n_layers)]
    if rule == "REAP":
        return list(moe[: math.floor(share * len(moe))])
    return None if outputs.forming is None else [layer for layer in moe if layer in outputs.forming]
