"""How the number of super experts depends on the two thresholds."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.routing.phenomena.expert_names import named
from moescope.routing.phenomena.expert_outputs import OUTPUTS_SQL, expert_outputs
from moescope.routing.phenomena.super_expert_figures import draw_sensitivity
from moescope.routing.phenomena.super_expert_rules import RULES, judge
from moescope.routing.phenomena.super_experts import check_thresholds
from moescope.store.run import Run

PERCENTILES = (95.0, 97.0, 99.0, 99.5, 99.9)
FRACTIONS = (0.05, 0.07, 0.1, 0.15, 0.2)


@analysis(
    name="super_expert_sensitivity",
    needs=("experts",),
    source="arXiv 2507.23279: P95 to P99.9 × 0.07 to 0.10; here up to 0.2 and down to 0.05",
    section="phenomena",
    order=40,
)
def super_expert_sensitivity(
    run: Run,
    *,
    rule: Literal["paper", "paper, A of forming layers", "released", "REAP"] = "released",
    share: float = 0.75,
) -> Result:
    """Do the same experts stay super experts when the rule's thresholds are moved?

    One rule of `super_experts` at every combination of percentile (P95, P97, P99, P99.5, P99.9) and fraction of the largest
    output (0.05, 0.07, 0.1, 0.15, 0.2). Experts that every combination names do not hang on a threshold.

    Args:
        rule: as in `super_experts`; those of the paper need the residual stream.
        share: of the layers, where the rule looks at the first ones only.
    """
    check_thresholds(50.0, 0.5, share)
    outputs = expert_outputs(run)
    if rule.startswith("paper") and outputs.forming is None:
        raise InputError(
            f"the rule {rule!r} asks where massive activations form, which run {run.name!r} does not tell",
            fix="record with the probe residual (--probe residual), or take rule='released'",
        )
    frame = outputs.frame
    cells: list[dict[str, object]] = []
    times = np.zeros(len(frame), np.int64)
    size = 0
    for percentile in PERCENTILES:
        for fraction in FRACTIONS:
            ruled = judge(outputs, rule, percentile=percentile, fraction=fraction, share=share)
            if ruled is None:
                raise InputError(
                    f"no layer that the rule {rule!r} looks at has an expert",
                    fix="take another rule, or a larger share",
                )
            times += ruled.chosen
            size = int(ruled.in_a.sum())
            cells.append(
                {
                    "metric": "super experts", "value": float(ruled.chosen.sum()), "percentile": percentile, "fraction": fraction,
                    "threshold": ruled.threshold, "experts": named(frame[ruled.chosen], 12) or "none",
                }
            )  # fmt: skip
    ever = frame[times > 0].rename(columns={"value": "largest"})
    ever = ever.assign(metric="combinations naming it", value=times[times > 0] / len(cells))
    kept = ever[["layer", "block", "expert", "metric", "value", "largest"]].sort_values(
        ["value", "largest"], ascending=False
    )
    table = pd.concat([pd.DataFrame(cells), kept], ignore_index=True)
    for name in ("layer", "expert"):
        table[name] = table[name].astype("Int64")
    return Result(
        title=_title(frame, times, cells),
        table=pa.Table.from_pandas(table, preserve_index=False),
        draw=draw_sensitivity,
        n=size,
        n_unit="experts in A",
        definition=f"super experts: how many the rule {rule!r} names at a percentile of A and a fraction of its largest; combinations "
        f"naming it: share of the {len(cells)} combinations. {rule}: {RULES[rule]}.",
        units={
            "value": "experts", "value[combinations naming it]": "share of combinations", "percentile": "percent of A",
            "fraction": "of max(A)", "threshold": "activation", "largest": "activation",
        },
        sql=OUTPUTS_SQL,
        sql_parameters={"run": run.run_id},
        computation="the rule at every combination of thresholds",
        notes=(
            *outputs.notes,
            f"A holds {size:,} experts: a percentile p can name at most about {size:,} × (1 − p).",
        ),
    )  # fmt: skip


def _title(frame: pd.DataFrame, times: NDArray[np.int64], cells: list[dict[str, object]]) -> str:
    counts = [int(float(str(cell["value"]))) for cell in cells]
    if max(counts) == 0:
        return f"No combination of percentile and fraction names a super expert, out of {len(cells)}"
    always = frame[times == len(cells)]
    head = (
        f"{named(always)} {'is' if len(always) == 1 else 'are'} named by all {len(cells)} combinations"
        if len(always)
        else f"No expert is named by all {len(cells)} combinations"
    )
    spread = f"{counts[0]} everywhere" if len(set(counts)) == 1 else f"from {min(counts)} to {max(counts)}"
    return f"{head} of percentile and fraction; the number of super experts is {spread}"
