"""Experts by name, as titles say them."""

from __future__ import annotations

import pandas as pd

from moescope.routing.grid import layer_name


def expert_name(layer: int, block: str, expert: int) -> str:
    """`L3·E54`; `L8·shared 1` for the first shared one.

    Example:
        >>> expert_name(3, "mlp", 54), expert_name(8, "mlp", -1)
        ('L3·E54', 'L8·shared 1')
    """
    return f"{layer_name(layer, block)}·" + (f"E{expert}" if expert >= 0 else f"shared {-expert}")


def named(frame: pd.DataFrame, most: int = 6) -> str:
    """Experts of a frame by name, in order of layers, up to `most` of them."""
    order = frame.sort_values(["layer", "block", "expert"])
    names = [expert_name(int(r.layer), str(r.block), int(r.expert)) for r in order.head(most).itertuples()]
    return ", ".join(names) + (f" and {len(order) - most} more" if len(order) > most else "")
