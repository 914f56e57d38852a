"""How well a few experts tell two sets of prompts apart, on prompts that did not choose them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.core.statistics import document_weights
from moescope.routing.effects.contrast_sides import Array, Sides, sides_of_labels
from moescope.routing.grid import series_figure
from moescope.store.run import Run

_TAILS = (0.025, 0.975)


@analysis(
    name="expert_detector",
    needs=("routing", "sequences"),
    source="CEAI: Unveiling and Consulting Core Experts in Retrieval-Augmented MoE-based LLMs (detectors of core experts)",
    section="specialization",
    order=81,
)
def expert_detector(
    run: Run,
    *,
    a: str | None = None,
    b: str | None = None,
    experts: Count = 32,
    tokens: str = "all",
    weighted: bool = False,
    controls: Count = 20,
    draws: Count = 1000,
    seed: Natural = 0,
) -> Result:
    """How well do a few experts tell one set of prompts from another, on prompts that did not choose them?

    The prompts of each set are halved at random. On one half, ΔP is the mean over prompts of the share of tokens that choose
    the expert, in `a` less in `b`; the N experts of largest |ΔP| are kept. On the other half a prompt's score is
    Σ ΔP · its own share, and the AUROC is how often a prompt of `a` scores over one of `b` (ties count half). Then the halves
    change places; the value is the mean of both.

    Args:
        a: label of the first set, or several divided by commas; the first label by name where not given.
        b: label of the second set, or several divided by commas; all other labels where not given.
        experts: the largest N; smaller ones are 1, 2, 4, ….
        tokens: which tokens count: all, prompt, generated, last, a span such as 0:10, or token:13.
        weighted: sum weights instead of counting choices.
        controls: random sets of N experts, with their own ΔP, for the control.
        draws: bootstrap resamples of the prompts tested.
        seed: of halves, random sets and resamples.

    Example:
        >>> import tempfile, pathlib
        >>> import pyarrow as pa
        >>> import moescope as ms
        >>> trace = pa.table({"sequence_id": [0, 1, 2, 3], "position": [0] * 4, "layer": [0] * 4,
        ...                   "experts": [[0], [0], [1], [1]], "label": ["a", "a", "b", "b"]})
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = store.import_trace(trace, name="tiny", n_experts=2)
        ...     ms.analyze(run, "expert_detector").df()["value"].tolist()
        [1.0, 1.0]
    """
    sides = sides_of_labels(run, a, b, tokens, weighted=weighted)
    if min(sides.sizes) < 2:
        raise InputError(
            "a detector needs prompts to choose experts and others to test them",
            expected="at least two prompts on either side",
            found=f"{sides.sizes[0]} of {sides.names[0]!r}, {sides.sizes[1]} of {sides.names[1]!r}",
        )
    share = (sides.sums / sides.tokens[:, None]).astype(np.float32)
    half = _halves(sides.first, seed)
    counts = _sizes(min(experts, share.shape[1]))
    frame = _curve(sides, share, half, counts, controls, draws, seed)
    best = frame.iloc[-1]  # the number asked for: the best of all would be chosen by the test itself
    return Result(
        title=_title(sides, best),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=len(sides.tokens),
        n_unit=f"prompts ({sides.sizes[0]:,} of {sides.names[0]}, {sides.sizes[1]:,} of {sides.names[1]})",
        definition="AUROC of Σ ΔP · share over the N experts of largest |ΔP|, ΔP from one half of the prompts, scores on the "
        "other half, mean of both ways round. 0.5 is chance.",
        units={"value": "AUROC, 0 to 1", "null": "AUROC", "experts": "experts", "n": "prompts tested"},
        interval=f"95 % percentile bootstrap over the prompts tested, {draws} resamples, widened to hold the value; the experts "
        "chosen are held fixed",
        null=f"as many experts chosen at random, with their own ΔP; mean of {controls} draws",
        computation="shares for each prompt and expert, halves, ranks",
        notes=sides.notes,
    )


def _title(sides: Sides, best: pd.Series[Any]) -> str:
    number = int(best["experts"])
    which = "1 expert tells" if number == 1 else f"{number} experts tell"
    return (
        f"{which} {sides.names[0]} from {sides.names[1]} with AUROC {best['value']:.3f} on prompts that did not choose "
        f"{'it' if number == 1 else 'them'}; as many at random: {best['null']:.3f}"
    )


def area(a: Array, b: Array, weight_a: Array | None = None, weight_b: Array | None = None) -> Array:
    """How often a score of `a` exceeds one of `b`, ties counting half.

    Args:
        a, b: scores of either set.
        weight_a, weight_b: [draw, score] how often each counts; None for once.

    Returns:
        one value, or one for each draw.

    Example:
        >>> area(np.array([2.0, 3.0]), np.array([1.0, 2.0])).item()
        0.875
    """
    above = (a[:, None] > b).astype(np.float64) + 0.5 * (a[:, None] == b)
    if weight_a is None or weight_b is None:
        return np.asarray(above.mean())
    found: Array = ((weight_a @ above) * weight_b).sum(1) / (len(a) * len(b))
    return found


def _halves(first: NDArray[np.bool_], seed: int) -> NDArray[np.int64]:
    """[prompt] 0 or 1, each set halved by itself."""
    generator = np.random.default_rng(seed)
    half = np.zeros(len(first), np.int64)
    for mine in (np.flatnonzero(first), np.flatnonzero(~first)):
        half[generator.permutation(mine)[: len(mine) // 2]] = 1
    return half


def _mean(share: NDArray[np.float32]) -> Array:
    found: Array = share.mean(0, dtype=np.float64)
    return found


def _sizes(most: int) -> list[int]:
    return sorted({1 << n for n in range(most.bit_length())} | {most})


def _curve(
    sides: Sides,
    share: NDArray[np.float32],
    half: NDArray[np.int64],
    counts: list[int],
    controls: int,
    draws: int,
    seed: int,
) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    values, lows, nulls = np.zeros(len(counts)), np.zeros((len(counts), draws)), np.zeros(len(counts))
    for tested in (0, 1):
        learn, test = half != tested, half == tested
        delta = _mean(share[learn & sides.first]) - _mean(share[learn & ~sides.first])
        a, b = share[test & sides.first], share[test & ~sides.first]
        weights = [document_weights(len(s), draws=draws, seed=seed + 2 * tested + n) for n, s in enumerate((a, b))]
        order = np.argsort(-np.abs(delta), kind="stable")
        for number, count in enumerate(counts):
            chosen = order[:count]
            scores = a[:, chosen] @ delta[chosen], b[:, chosen] @ delta[chosen]
            values[number] += area(*scores) / 2
            lows[number] += area(*scores, *(w.astype(np.float64) for w in weights)) / 2
            for _ in range(controls):
                drawn = generator.choice(len(delta), count, replace=False)
                nulls[number] += area(a[:, drawn] @ delta[drawn], b[:, drawn] @ delta[drawn]) / (2 * controls)
    low, high = np.quantile(lows, _TAILS, axis=1)
    return pd.DataFrame(
        {
            "metric": "AUROC",
            "experts": counts,
            "value": values,
            "ci_low": np.minimum(low, values),
            "ci_high": np.maximum(high, values),
            "null": nulls,
            "n": len(half),
        }
    )


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    return series_figure(
        frame,
        x=[str(n) for n in frame["experts"]],
        title_x="experts kept, by |ΔP| on the other half",
        title_y="AUROC",
        null=list(frame["null"]),
        null_name="random experts",
    )
