"""Pairs of latent and expert as the store has them: which autoencoder, which layer, and the numbers of each metric."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from moescope.core.errors import InputError
from moescope.routing.features.feature_tables import Sae, chosen_sae
from moescope.store.run import Run

PAIRS_SQL = """
    SELECT feature, layer, block, expert, metric, value, ci_low, ci_high, null_value AS "null", null_kind, n, unit
    FROM feature_experts
    WHERE run_id = $run AND sae_id = $sae
    ORDER BY layer, block, metric, feature, expert
"""
AGREEMENT_SQL = """
    SELECT metric, condition, group_value, value, ci_low, ci_high
    FROM sae_measures
    WHERE run_id = $run AND sae_id = $sae AND metric = 'gates_spearman'
"""
INTERVAL = "95 % percentile bootstrap over documents"
NULL = (
    "writing: mean size of the same expert's contribution on the same tokens along decoder rows of latents of nearest frequency; "
    "gating: mean size of the number with those latents (of the lift their mean); ablation: matched experts"
)
MAIN = {"writes": "writes_excess", "gates": "gates_logit"}
NAMES = {
    "writes": "writes",
    "writes_chosen": "writes where chosen",
    "writes_share": "share of the block",
    "writes_excess": "writes in excess",
    "writes_excess_p": "p of the excess",
    "writes_encoder": "writes along the encoder",
    "gates_weights": "gates by weights",
    "gates_logit": "moves the logit",
    "gates_logit_p": "p of the logit",
    "gates_lift": "lift of being chosen",
    "ablation_drop": "falls without its writers",
    "ablation_drop_excess": "falls more than with matched experts",
    "ablation_drop_control": "falls with matched experts",
    "ablated_writer": "taken out",
}
DEFINITIONS = {
    "writes": "writes: mean over tokens on which the latent is active of the expert's contribution to the stream along the unit decoder "
    "row, its routing weight included, 0 where it was not chosen; in excess: less the same mean over the tokens on which the latent "
    "is inactive; share: of what the block writes there.",
    "gates": "moves the logit: mean of the expert's router logit (less the token's mean over experts) on tokens on which the latent is "
    "active, less that on the others; lift: P(chosen | active) ÷ P(chosen); by weights: what a unit of activation adds to the logit by "
    "the direct path, from the decoder row, the norm and the router's row, less the mean over experts.",
}


@dataclass(frozen=True)
class Pairs:
    """What a run's tables hold of one autoencoder and the experts.

    Attributes:
        sae: which.
        frame: rows of `feature_experts`.
    """

    sae: Sae
    frame: pd.DataFrame

    def of(self, metric: str) -> pd.DataFrame:
        """Rows of a metric."""
        return self.frame[self.frame["metric"] == metric]

    def parameters(self, run: Run) -> dict[str, str]:
        """Of `PAIRS_SQL`."""
        return {"run": run.run_id, "sae": self.sae.sae_id}


def read_pairs(run: Run, sae: str | None) -> Pairs:
    """The pairs of an autoencoder, the newest that has some where None."""
    chosen = chosen_sae(run, sae, table="feature_experts")
    frame = run.sql(PAIRS_SQL, {"sae": chosen.sae_id}).df()
    frame["expert"] = frame["expert"].astype("Int64")
    return Pairs(chosen, frame)


def layer_of(part: pd.DataFrame, layer: int | None, what: str) -> int:
    """The layer asked for, or the first that has rows.

    Raises:
        InputError: none has, or not that one.
    """
    there = sorted(int(n) for n in part["layer"].unique())
    if not there or (layer is not None and layer not in there):
        asked = "" if layer is None else f" in layer {layer}"
        raise InputError(
            f"nothing was measured of {what}{asked}",
            expected=f"one of layers {there}" if there else None,
            fix="measure it: moescope sae experts",
        )
    return there[0] if layer is None else layer


def expert_label(expert: int) -> str:
    """E5; shared experts, which are −1 and below, by that name.

    Example:
        >>> expert_label(5), expert_label(-1)
        ('E5', 'shared')
    """
    return f"E{expert}" if expert >= 0 else "shared" if expert == -1 else f"shared {-expert}"


def with_bounds(row: pd.Series, digits: int = 3) -> str:
    """A value with its interval, where it has one."""
    text = f"{row['value']:.{digits}g}"
    return text if pd.isna(row["ci_low"]) else f"{text} [{row['ci_low']:.{digits}g}, {row['ci_high']:.{digits}g}]"


def agreement(run: Run, sae: Sae) -> list[str]:
    """How far router weights alone tell the measured logits, a sentence a layer."""
    found = run.sql(AGREEMENT_SQL, {"sae": sae.sae_id}).df()
    told = []
    for layer, part in found.groupby("group_value", sort=True):
        by = part.set_index("condition")
        if {"sae", "permuted latents"} <= set(by.index):
            told.append(
                f"Layer {layer}: router weights tell the measured logits with a Spearman correlation of "
                f"{with_bounds(by.loc['sae'], 2)}; permuted latents give {with_bounds(by.loc['permuted latents'], 2)}."
            )
    return told
