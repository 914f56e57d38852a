"""How numbers are written: the same everywhere, none invented, none rounded to a false zero."""

from __future__ import annotations

import math

MISSING = "—"


def count(n: float | None) -> str:
    """A count in full, thousands grouped.

    Example:
        >>> count(25600123)
        '25,600,123'
    """
    return MISSING if absent(n) else f"{n:,.0f}".replace("-", "−")


def short_count(n: float | None) -> str:
    """A count for a card: three significant digits with k, M or G.

    Example:
        >>> short_count(66246), short_count(240)
        ('66.2 k', '240')
    """
    if n is None or absent(n):
        return MISSING
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        # What rounds to 1,000 k is 1 M.
        if abs(n) >= 10 * size or (abs(n) >= 0.9995 * size and unit != "k"):
            return f"{n / size:.3g} {unit}".replace("-", "−")
    return count(n)


def share(part: float | None, whole: float | None) -> str:
    """A share in percent; more than nothing is never written as 0 %.

    Example:
        >>> share(124, 1000), share(1, 100000), share(0, 10), share(-5, 100)
        ('12.4 %', '<0.1 %', '0 %', '−5.0 %')
    """
    if part is None or whole is None or absent(part) or absent(whole) or whole == 0:
        return MISSING
    percent = 100 * part / whole
    if percent == 0:
        return "0 %"
    if abs(percent) < 0.1:
        return "<0.1 %" if percent > 0 else ">−0.1 %"
    if 99.95 <= abs(percent) < 100:
        return ">99.9 %" if percent > 0 else "<−99.9 %"
    return f"{percent:.1f} %".replace("-", "−")


def ratio(value: float | None) -> str:
    """A ratio to a reference, such as load over uniform load.

    Example:
        >>> ratio(3.2), ratio(0.042)
        ('3.20×', '0.042×')
    """
    if value is None or absent(value):
        return MISSING
    return f"{value:.2f}×" if value >= 0.1 or value == 0 else f"{value:.2g}×"


def decimal(value: float | None, places: int = 3) -> str:
    """A number with a fixed number of decimals; one that would round to 0 keeps two of its own digits.

    Example:
        >>> decimal(-0.25), decimal(0.0003), decimal(0)
        ('−0.250', '0.0003', '0.000')
    """
    if value is None or absent(value):
        return MISSING
    false_zero = value != 0 and round(float(value), places) == 0
    return (f"{value:.2g}" if false_zero else f"{value + 0.0:,.{places}f}").replace("-", "−")


def interval(value: float | None, low: float | None, high: float | None, places: int = 3) -> str:
    """An estimate with the interval round it.

    Example:
        >>> interval(0.412, 0.38, 0.447)
        '0.412 [0.380, 0.447]'
    """
    if absent(value) or absent(low) or absent(high):
        return decimal(value, places)
    return f"{decimal(value, places)} [{decimal(low, places)}, {decimal(high, places)}]"


def absent(value: float | None) -> bool:
    """Whether there is no number to show."""
    return value is None or math.isnan(value)
