"""What a run's records hold of the chain: effects of its cuts, and the heads that lead."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd

from moescope.store.run import Run

LINKS = ("writer", "massive to zero", "massive to mean", "heads")

EFFECTS_SQL = """
    WITH named AS (
        SELECT effect_id, regexp_extract(intervention->>'name', '^chain, ([a-z ]+): (.*)$', ['link', 'cut']) AS part
        FROM effects
        WHERE base_run_id = $run AND kind = 'target' AND starts_with(intervention->>'name', 'chain, ')
        GROUP BY ALL
    ), newest AS (
        SELECT part.link AS link, max(effect_id::VARCHAR) AS effect_id
        FROM named
        GROUP BY part.link
    )
    SELECT w.link, n.part.cut AS cut, e.kind, e.draw, e.group_kind, e.group_value, e.metric, e.value, e.ci_low, e.ci_high,
        e.n, e.unit
    FROM newest w
    JOIN named n ON n.effect_id::VARCHAR = w.effect_id
    JOIN effects e ON e.effect_id = n.effect_id
    ORDER BY w.link, e.kind DESC, e.draw, e.group_kind, e.group_value, e.metric
"""
_HEADS_SQL = """
    SELECT layer, head, metric, value
    FROM heads
    WHERE run_id = $run AND condition = 'base' AND metric = $metric AND isfinite(value)
    ORDER BY value DESC, layer, head
"""
_SUPER_SQL = """
    SELECT layer, block, expert, string_agg(rule, ', ' ORDER BY rule) AS rules, max(value) AS value
    FROM super_experts
    WHERE run_id = $run
    GROUP BY layer, block, expert
    ORDER BY layer, block, expert
"""


@dataclass(frozen=True)
class Share:
    """One number of a cut, with that of its controls.

    Attributes:
        value, low, high: of the cut, with its interval; NaN for no bound.
        null: mean over the controls; NaN without any.
        null_low, null_high: smallest and largest of them.
        n: observations behind it.
    """

    value: float
    low: float
    high: float
    null: float
    null_low: float
    null_high: float
    n: int


class ChainEffects:
    """The newest effect of each link of a run's chain.

    Args:
        run: whose chain was cut; there may be none.
    """

    def __init__(self, run: Run) -> None:
        self.frame: pd.DataFrame = run.sql(EFFECTS_SQL).df()

    @property
    def links(self) -> list[str]:
        """Links that were cut, from the writer on."""
        present = set(self.frame["link"])
        return [link for link in LINKS if link in present]

    def cut(self, link: str) -> str | None:
        """What was cut; None where the link was not."""
        part = self.frame[self.frame["link"] == link]
        return None if part.empty else str(part["cut"].iloc[0])

    def share(self, link: str, metric: str, *, layer: int | None = None) -> Share | None:
        """A metric of a link over everything, or of one layer; None where it was not measured."""
        part = self.frame[(self.frame["link"] == link) & (self.frame["metric"] == metric)]
        part = part[part["group_kind"] == "all"] if layer is None else part[_of_layer(part, layer)]
        target, controls = part[part["kind"] == "target"], part[part["kind"] == "control"]["value"].to_numpy(float)
        if target.empty:
            return None
        row = target.iloc[0]
        drawn = controls if len(controls) else np.array([np.nan])
        null, null_low, null_high = float(drawn.mean()), float(drawn.min()), float(drawn.max())
        bounds = [float(row[name]) if pd.notna(row[name]) else np.nan for name in ("ci_low", "ci_high")]
        return Share(float(row["value"]), bounds[0], bounds[1], null, null_low, null_high, int(row["n"]))

    def layers(self, link: str, metric: str) -> list[int]:
        """Layers of which a metric of a link is known."""
        part = self.frame[(self.frame["link"] == link) & (self.frame["metric"] == metric)]
        return sorted({int(value) for value in part.loc[part["group_kind"] == "layer", "group_value"]})

    @property
    def controls(self) -> int:
        """How many controls each cut has, at the least."""
        drawn = self.frame[self.frame["kind"] == "control"].groupby("link")["draw"].nunique()
        return int(drawn.reindex(self.links).fillna(0).min()) if self.links else 0


def _of_layer(part: pd.DataFrame, layer: int) -> pd.Series:
    return (part["group_kind"] == "layer") & (part["group_value"] == str(layer))


def heads_of(run: Run, metric: str) -> pd.DataFrame:
    """Heads by a metric that stands in `heads`, largest first."""
    return run.sql(_HEADS_SQL, {"metric": metric}).df()


def super_experts_of(run: Run) -> pd.DataFrame:
    """Experts that some rule calls super experts, as they were written."""
    return run.sql(_SUPER_SQL).df()


def short(cut: str, most: int = 3) -> str:
    """A cut by name, its list shortened.

    Example:
        >>> short("L1·E3, L2·E5, L3·E7, L4·E9")
        'L1·E3, L2·E5, L3·E7 and 1 more'
    """
    parts = re.split(r", ", cut)
    return ", ".join(parts[:most]) + (f" and {len(parts) - most} more" if len(parts) > most else "")
