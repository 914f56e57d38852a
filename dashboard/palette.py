"""The colour scale of the token view, with the ink that reads best on each colour."""

from __future__ import annotations

from functools import cache

from moescope.core.figures import SEQUENTIAL
from moescope.dashboard.paint import STEPS


@cache
def palette() -> list[tuple[str, str]]:
    """Background and text colour of each step; black or white, whichever contrasts more (4.5 : 1 or better on Cividis)."""
    from plotly.colors import sample_colorscale

    colours = sample_colorscale(SEQUENTIAL, [step / STEPS for step in range(STEPS + 1)], colortype="tuple")
    return [(f"#{''.join(f'{round(255 * part):02x}' for part in colour)}", _ink(colour)) for colour in colours]


def luminance(colour: tuple[float, float, float]) -> float:
    """Relative luminance of an sRGB colour in 0…1 (WCAG 2.2)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _ink(colour: tuple[float, float, float]) -> str:
    light = luminance(colour)
    return "#000" if (light + 0.05) / 0.05 >= 1.05 / (light + 0.05) else "#fff"
