"""Metrics of effects, as a reader sees them."""

from __future__ import annotations

from collections.abc import Iterable
from math import floor, isnan, log10

_PLAIN = {
    "nll": "NLL",
    "kl": "KL",
    "flips": "top-1 flips",
    "repetition": "repetition (seq-rep-4)",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "distinct_3": "distinct-3",
    "length": "length",
}
_ORDER = (
    "delta_nll", "kl", "flips", "content_delta_nll", "rerouting_delta_nll", "content_kl", "rerouting_kl", "content_flips",
    "rerouting_flips", "delta_repetition", "delta_distinct_1", "delta_distinct_2", "delta_distinct_3", "delta_length",
)  # fmt: skip
_PARTS = {"content": "content", "rerouting": "re-routing"}


def metric_name(metric: str) -> str:
    """A stored metric as it is written in figures.

    Example:
        >>> metric_name("delta_nll"), metric_name("rerouting_delta_nll"), metric_name("base_length")
        ('ΔNLL', 'ΔNLL, re-routing', 'length without the edit')
    """
    part, _, rest = metric.partition("_")
    if part in _PARTS:
        return f"{metric_name(rest)}, {_PARTS[part]}"
    if part == "delta":
        return f"Δ{'' if rest == 'nll' else ' '}{_PLAIN.get(rest, rest)}"
    if part == "base":
        return f"{_PLAIN.get(rest, rest)} without the edit"
    return _PLAIN.get(metric, metric)


def in_order(metrics: Iterable[str]) -> list[str]:
    """Metrics as they are read: the whole effect first, then its parts, then what the model writes; base values last."""
    given = list(dict.fromkeys(metrics))
    known = [metric for metric in _ORDER if metric in given]
    return known + sorted(metric for metric in given if metric not in known)


def with_interval(value: float, low: float | None, high: float | None, *, sign: bool = False) -> str:
    """A number with its interval, to so many places that the interval shows.

    Example:
        >>> with_interval(0.12345, 0.101, 0.1449), with_interval(4.5, None, None)
        ('0.123 (0.101 to 0.145)', '4.5')
    """
    if low is None or high is None or isnan(low) or isnan(high):
        return minus(f"{value:{'+' if sign else ''}.3g}")
    places = decimals(high - low)
    shown = f"{value:{'+' if sign else ''}.{places}f} ({low:.{places}f} to {high:.{places}f})"
    return minus(shown)


def decimals(width: float) -> int:
    """Decimal places that show an interval of this width with two figures."""
    return 3 if width <= 0 else max(0, min(8, 1 - floor(log10(width))))


def minus(text: str) -> str:
    """Numbers with a minus sign instead of a hyphen."""
    return text.replace("-", "−")
