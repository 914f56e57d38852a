"""How far a result lies from its chance level, on one scale for every analysis, so that findings can be ranked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from moescope.core.result import Result

Verdict = Literal["beyond", "partly", "within", "unjudged"]
VERDICTS: tuple[Verdict, ...] = ("beyond", "partly", "within", "unjudged")
WORDS: dict[Verdict, str] = {
    "beyond": "beyond chance",
    "partly": "in part",
    "within": "within chance",
    "unjudged": "no chance level",
}

DEFINITION = (
    "Distance: |value − chance| in half-widths of the value's 95 % interval, so 1 is the edge of the interval; the median over "
    "all numbers (layers, labels, experts, …) of the first measure that the analysis tells with a chance level and an interval. "
    "Beyond chance: the chance level lies outside the intervals of at least half of these numbers; in part: of more than 5 % of "
    "them, which chance alone would give with a probability under 5 % (binomial, as if they were independent); within chance: "
    "otherwise. Where the chance level is the mean of controls whose least and largest are told (control_low and control_high, or "
    "null_low and null_high), a number counts as beyond it only if it lies outside these two as well. The distance grows with the "
    "number of documents; value ÷ chance, of the number at the median, does not. Where an interval has no width there is no "
    "distance; such a finding stands last in its group."
)
"""What `Finding` holds, for the page that lists findings."""

_NEEDED = ["metric", "value", "null", "ci_low", "ci_high"]
_SPREADS = (("control_low", "control_high"), ("null_low", "null_high"))


@dataclass(frozen=True)
class Finding:
    """One result and how far it is from chance.

    Attributes:
        result: the answer; its title is the finding.
        verdict: whether its numbers lie beyond chance.
        metric: the measure that was judged; None where none can be.
        distance: median distance from chance, in half-widths of the interval; None where intervals have no width.
        beyond, cells: numbers whose interval leaves chance out and that lie outside the controls' range, of how many.
        value, null: the number at the median distance and its chance level.
    """

    result: Result
    verdict: Verdict
    metric: str | None = None
    distance: float | None = None
    beyond: int = 0
    cells: int = 0
    value: float | None = None
    null: float | None = None

    @property
    def ratio(self) -> float | None:
        """Value over chance of the number at the median; None where one of them is not positive."""
        if self.value is None or self.null is None or self.value <= 0 or self.null <= 0:
            return None
        return self.value / self.null

    @property
    def unit(self) -> str:
        """Unit of value and chance level; empty where the result names none for this measure."""
        units = self.result.units
        return str(units.get(f"value[{self.metric}]", units.get("value", "")))


def finding(result: Result) -> Finding:
    """How far a result lies from its chance level; see `DEFINITION`.

    Example:
        >>> import pyarrow as pa
        >>> rows = {"metric": ["share"] * 2, "value": [0.5, 0.7], "null": [0.1, 0.1], "ci_low": [0.4, 0.5],
        ...         "ci_high": [0.6, 0.9]}
        >>> found = finding(Result("Half", pa.table(rows), "share", {}, 2, "tokens"))
        >>> found.verdict, round(found.distance, 3), found.beyond
        ('beyond', 3.5, 2)
    """
    judged = _judged(result)
    if judged.empty:
        return Finding(result, "unjudged")
    value, null, low, high = (judged[name].to_numpy(float) for name in _NEEDED[1:])
    apart, half = np.abs(value - null), (high - low) / 2
    distance = np.full(len(judged), np.inf)
    np.divide(apart, half, out=distance, where=half > 0)
    distance[apart == 0] = 0.0
    beyond = int((((null < low) | (null > high)) & _outside(judged, value)).sum())
    typical = float(np.median(distance))
    middle = int(np.argsort(distance, kind="stable")[len(distance) // 2])
    return Finding(
        result,
        _verdict(beyond, len(judged)),
        str(judged["metric"].iloc[0]),
        typical if math.isfinite(typical) else None,
        beyond,
        len(judged),
        float(value[middle]),
        float(null[middle]),
    )


def in_order(findings: list[Finding]) -> list[Finding]:
    """The largest first: beyond chance, then in part, within chance, and those without a chance level, each by distance."""
    return sorted(findings, key=lambda f: (VERDICTS.index(f.verdict), -(f.distance or 0.0), f.result.name))


def _judged(result: Result) -> pd.DataFrame:
    """The rows of the first measure that has a chance level and an interval."""
    if not set(_NEEDED) <= set(result.table.column_names):
        return pd.DataFrame(columns=_NEEDED)
    names = result.table.column_names
    spread = next((pair for pair in _SPREADS if set(pair) <= set(names)), ())
    frame = result.table.select([*_NEEDED, *spread]).to_pandas()
    numbers = frame[_NEEDED[1:]].astype(float)
    frame = frame[np.isfinite(numbers).all(axis=1)]
    return frame if frame.empty else frame[frame["metric"] == frame["metric"].iloc[0]]


def _outside(judged: pd.DataFrame, value: NDArray[np.float64]) -> NDArray[np.bool_]:
    """[row] Whether a number lies outside the range of its controls; true where no range is told."""
    outside = np.ones(len(judged), bool)
    for lowest, largest in _SPREADS:
        if lowest in judged:
            low, high = judged[lowest].to_numpy(float), judged[largest].to_numpy(float)
            outside = (value < low) | (value > high) | np.isnan(low) | np.isnan(high)
    return outside


def _verdict(beyond: int, cells: int) -> Verdict:
    if 2 * beyond >= cells:
        return "beyond"
    return "partly" if beyond and _at_least(beyond, cells) < 0.05 else "within"


def _at_least(beyond: int, cells: int, chance: float = 0.05) -> float:
    """Probability that at least so many of so many intervals leave chance out where there is nothing but chance."""
    below = [
        math.exp(
            math.lgamma(cells + 1)
            - math.lgamma(k + 1)
            - math.lgamma(cells - k + 1)
            + k * math.log(chance)
            + (cells - k) * math.log1p(-chance)
        )
        for k in range(beyond)
    ]
    return 1 - math.fsum(below)
