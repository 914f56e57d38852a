"""The largest |output| of every expert of a run: the set A that the rules for super experts look at."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from moescope.core.errors import InputError
from moescope.routing.phenomena.massive_records import forming_layers
from moescope.store.run import Run

OUTPUTS_SQL = """
    SELECT e.layer, e.block, e.expert, e.max_abs_out::DOUBLE AS value, e.max_abs_channel AS channel, e.max_abs_token AS token,
        t.position, e.tokens AS n
    FROM experts e
    LEFT JOIN layers l ON l.run_id = e.run_id AND l.layer = e.layer AND l.block = e.block
    LEFT JOIN tokens t ON t.run_id = e.run_id AND t.token = e.max_abs_token
    WHERE e.run_id = $run AND isfinite(e.max_abs_out) AND e.expert < coalesce(l.n_experts, e.expert + 1)
    ORDER BY value DESC, e.layer, e.block, e.expert
"""
_COUNTS_SQL = """
    SELECT
        count(*) FILTER (WHERE e.expert < coalesce(l.n_experts, e.expert + 1) AND e.max_abs_out IS NULL) AS unseen,
        count(*) FILTER (WHERE e.expert >= l.n_experts) AS empty,
        count(*) FILTER (WHERE NOT isfinite(e.max_abs_out)) AS broken,
        count(*) FILTER (WHERE e.expert < 0) AS shared
    FROM experts e
    LEFT JOIN layers l ON l.run_id = e.run_id AND l.layer = e.layer AND l.block = e.block
    WHERE e.run_id = $run
"""
_LAYERS_SQL = "SELECT max(layer) + 1, sum(n_shared) FROM layers WHERE run_id = $run"


@dataclass
class ExpertOutputs:
    """What the rules for super experts need.

    Attributes:
        frame: one row an expert that was chosen: layer, block, expert, value (the largest |output| over its tokens and channels,
            before the routing weight), channel, token, position, n; largest first.
        n_layers: blocks of the model, those without experts included.
        forming: layers whose block forms massive activations; None where the residual stream was not recorded.
        notes: what was left out.
    """

    frame: pd.DataFrame
    n_layers: int
    forming: list[int] | None
    notes: tuple[str, ...]

    @property
    def moe_layers(self) -> list[int]:
        """Layers with experts, in order."""
        return sorted(map(int, self.frame["layer"].unique()))


def expert_outputs(run: Run) -> ExpertOutputs:
    """Read them.

    Raises:
        InputError: no expert has a finite output.
    """
    frame = run.sql(OUTPUTS_SQL).df()
    if frame.empty:
        raise InputError(f"run {run.name!r} has no finite expert output", found="no choice, NaN or infinity")
    blocks, shared = run.store.fetch(_LAYERS_SQL, {"run": run.run_id})[0]
    told = (run.info["anatomy"] or {}).get("n_layers") or 0
    n_layers = max(int(told), int(blocks or 0), int(frame["layer"].max()) + 1)
    return ExpertOutputs(frame, n_layers, forming_layers(run), _notes(run, int(shared or 0)))


def _notes(run: Run, shared_experts: int) -> tuple[str, ...]:
    unseen, empty, broken, shared = run.store.fetch(_COUNTS_SQL, {"run": run.run_id})[0]
    notes = []
    if unseen:
        notes.append(f"{unseen:,} experts were never chosen and have no output; they are not in A.")
    if empty:
        notes.append(f"{empty:,} null experts compute nothing; they are not in A.")
    if broken:
        notes.append(f"{broken:,} experts put out NaN or infinity; they are not in A.")
    if shared:
        notes.append(f"{shared:,} shared experts are in A, with ids −1, −2, ….")
    elif shared_experts:
        notes.append(
            "The model has shared experts, whose outputs this run does not hold: A holds routed experts alone, where "
            "the authors' code takes shared ones in."
        )
    return tuple(notes)
