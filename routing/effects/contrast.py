"""Contrast of two sets of prompts: which experts the one uses more than the other, beyond what shuffled prompts give."""

from __future__ import annotations

import math

import pandas as pd
import pyarrow as pa

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.result import Result
from moescope.routing.effects.contrast_differences import Difference, Measure, difference
from moescope.routing.effects.contrast_figure import contrast_figure
from moescope.routing.effects.contrast_sides import Sides, sides_of_labels, sides_of_runs
from moescope.routing.grid import layer_name
from moescope.store.run import Run

_SOURCE = (
    "SteerMoE, arXiv 2509.09660 with adobe-research/SteerMoE (risk_difference); fTRI, arXiv 2502.11096 (resonance); "
    "CEAI (prompt_mean, tokens=last): Unveiling and Consulting Core Experts in Retrieval-Augmented MoE-based LLMs"
)
_WORDS: dict[Measure, str] = {
    "risk_difference": "share of the set's tokens that choose the expert, tokens of all its prompts pooled",
    "prompt_mean": "mean over the set's prompts of the share of a prompt's tokens that choose the expert",
    "resonance": "mean over the set's prompts of how many of a prompt's tokens choose the expert",
}
_UNITS: dict[Measure, str] = {
    "risk_difference": "share of tokens",
    "prompt_mean": "share of tokens",
    "resonance": "tokens a prompt",
}
_FOUND = 0.05


@analysis(name="expert_contrast", needs=("routing", "sequences"), source=_SOURCE, section="specialization", order=80)
def expert_contrast(
    run: Run,
    *,
    a: str | None = None,
    b: str | None = None,
    measure: Measure = "risk_difference",
    tokens: str = "all",
    weighted: bool = False,
    permutations: Count = 1000,
    draws: Count = 1000,
    seed: Natural = 0,
) -> Result:
    """Which experts does one set of prompts use more than another, beyond what shuffled prompts give?

    For every expert, the measure in the set `a` less the measure in the set `b`. `risk_difference`: share of the set's tokens
    that choose the expert, all its tokens pooled (SteerMoE). `prompt_mean`: that share prompt by prompt, then the mean over
    prompts; with `tokens="last"` each prompt gives 1 or 0 (CEAI). `resonance`: tokens of a prompt that choose the expert,
    mean over prompts (the differential map of fTRI: mean of the wanted answers less mean of all others). With `weighted`,
    the weight given to the expert stands for each choice.

    Sets are shuffled over prompts for p (two-sided, the observation counted) and q (Benjamini–Hochberg over all experts that
    anyone chose).

    Trap: pooled tokens let long prompts decide, and the two sets may have very different numbers of tokens; the authors'
    code has no test at all. A sum over a prompt's tokens grows with its length: of sets of unlike length, every busy expert
    resonates. A risk difference does not see gate weights: `weighted` does.

    Args:
        a: label of the first set, or several divided by commas; the first label by name where not given.
        b: label of the second set, or several divided by commas; all other labels where not given.
        measure: what is compared.
        tokens: which tokens count: all, prompt, generated, last (the last read token of a prompt), a span of places in the
            sequence such as 0:10, or token:13 (a token id).
        weighted: sum weights instead of counting choices.
        permutations: shuffles of the sets over prompts.
        draws: bootstrap resamples of prompts, each set by itself.
        seed: of both.

    Example:
        >>> import tempfile, pathlib
        >>> import pyarrow as pa
        >>> import moescope as ms
        >>> trace = pa.table({"sequence_id": [0, 0, 1, 1], "position": [0, 1, 0, 1], "layer": [0] * 4,
        ...                   "experts": [[0], [0], [0], [1]], "label": ["rude", "rude", "kind", "kind"]})
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = store.import_trace(trace, name="tiny", n_experts=2)
        ...     frame = ms.analyze(run, "expert_contrast", a="rude", b="kind").df()
        >>> frame.set_index("expert")["value"][0].item()  # 2 of 2 tokens less 1 of 2
        0.5
    """
    sides = sides_of_labels(run, a, b, tokens, weighted=weighted)
    return _result(sides, measure, tokens, weighted=weighted, permutations=permutations, draws=draws, seed=seed)


@analysis(name="expert_contrast_of_runs", runs=2, needs=("routing",), source=_SOURCE, section="comparison", order=60)
def expert_contrast_of_runs(
    run: Run,
    other: Run,
    *,
    measure: Measure = "risk_difference",
    tokens: str = "all",
    weighted: bool = False,
    permutations: Count = 1000,
    draws: Count = 1000,
    seed: Natural = 0,
) -> Result:
    """Which experts does the corpus of one run use more than that of another, beyond what shuffled prompts give?

    As `expert_contrast`, each run a set. Prompts are taken as independent, also where both runs hold the same texts; for
    the same texts under two conditions, `compare_routing` goes token by token.

    Args:
        measure: risk_difference, prompt_mean or resonance, as in `expert_contrast`.
        tokens: which tokens count: all, prompt, generated, last, a span such as 0:10, or token:13.
        weighted: sum weights instead of counting choices.
        permutations: shuffles of the runs over prompts.
        draws: bootstrap resamples of prompts, each run by itself.
        seed: of both.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     runs = [ms.record(ms.load("demo"), ["Hello."], store, name=n, progress=False) for n in ("a", "b")]
        ...     ms.analyze(runs, "expert_contrast_of_runs").df()["value"].abs().max().item()
        0.0
    """
    sides = sides_of_runs(run, other, tokens, weighted=weighted)
    return _result(sides, measure, tokens, weighted=weighted, permutations=permutations, draws=draws, seed=seed)


def _result(
    sides: Sides, measure: Measure, tokens: str, *, weighted: bool, permutations: int, draws: int, seed: int
) -> Result:
    found = difference(sides, measure, permutations=permutations, draws=draws, seed=seed)
    frame = _table(sides, found, measure, weighted=weighted)
    unit = _UNITS[measure] if not weighted else "weight a prompt" if measure == "resonance" else "weight a token"
    definition = _WORDS[measure].replace("that choose", "by the weight they give") if weighted else _WORDS[measure]
    return Result(
        title=_title(frame, sides, unit, permutations),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=contrast_figure,
        n=len(sides.tokens),
        n_unit=f"prompts ({sides.sizes[0]:,} of {sides.names[0]}, {sides.sizes[1]:,} of {sides.names[1]})",
        definition=f"{definition[0].upper()}{definition[1:]}: {sides.names[0]} (column a) less {sides.names[1]} (column b). "
        f"Tokens that count: {tokens}.",
        units={
            "value": f"{unit}, {sides.names[0]} less {sides.names[1]}",
            "a": unit,
            "b": unit,
            "null": unit,
            "p": "probability",
            "q": "false-discovery rate",
            "n": "prompts",
        },
        interval=f"95 % percentile bootstrap over prompts, each set by itself, {draws} resamples",
        null=f"sets shuffled over prompts, {permutations} times: null is the mean size of the difference, null_low and "
        f"null_high hold 95 % of the differences; the smallest possible p is {1 / (permutations + 1):.2g}",
        computation="decisions counted for each prompt and expert, then shuffles and resamples of prompts",
        notes=_notes(sides, measure),
    )


def _table(sides: Sides, found: Difference, measure: Measure, *, weighted: bool) -> pd.DataFrame:
    """One row an expert, the surest differences first."""
    frame = pd.DataFrame(
        {
            **sides.places(),
            "metric": ("weighted " if weighted else "") + measure.replace("_", " "),
            "value": found.value,
            "ci_low": found.low,
            "ci_high": found.high,
            "null": found.null,
            "null_low": found.null_low,
            "null_high": found.null_high,
            "a": found.a,
            "b": found.b,
            "p": found.p,
            "q": found.q,
            "n": len(sides.tokens),
        }
    )
    order = frame.assign(size=-frame["value"].abs()).sort_values(["q", "size"], kind="stable").index
    return frame.loc[order].reset_index(drop=True)


def _title(frame: pd.DataFrame, sides: Sides, unit: str, permutations: int) -> str:
    a, b = sides.names
    sure = frame[frame["q"] < _FOUND]
    if sure.empty:
        used, smallest = int(((frame["a"] != 0) | (frame["b"] != 0)).sum()), 1 / (permutations + 1)
        if used * smallest > _FOUND and bool((frame["p"] <= smallest * (1 + 1e-6)).any()):
            return (
                f"Undecided: by {permutations:,} shuffles no fewer than {math.ceil(used * smallest / _FOUND):,} of {used:,} experts "
                f"could pass q < {_FOUND} together, and some have the smallest possible p; ask for more permutations"
            )
        return f"No expert tells {a} from {b} beyond what shuffled prompts give (q < {_FOUND})"
    most = sure.iloc[sure["value"].abs().argmax()]
    more, less = (a, b) if most["value"] > 0 else (b, a)
    return (
        f"{len(sure):,} of {len(frame):,} experts tell {a} from {b} (q < {_FOUND}); most: "
        f"{layer_name(most['layer'], most['block'])}·E{most['expert']}, {max(most['a'], most['b']):.3g} in {more} against "
        f"{min(most['a'], most['b']):.3g} in {less} ({unit})"
    )


def _notes(sides: Sides, measure: Measure) -> tuple[str, ...]:
    notes = list(sides.notes)
    first, second = sides.side_tokens
    if max(first, second) > 2 * min(first, second):
        notes.append(f"The sets differ in size: {first:,} tokens of {sides.names[0]}, {second:,} of {sides.names[1]}.")
    lengths = first / sides.sizes[0], second / sides.sizes[1]
    if measure == "resonance" and max(lengths) > 1.25 * min(lengths):
        notes.append(
            f"Prompts differ in length ({lengths[0]:.1f} and {lengths[1]:.1f} tokens on average), and sums grow with it: "
            "prompt_mean compares shares."
        )
    if min(sides.sizes) < 2:
        notes.append("A set has one prompt: no interval, and shuffles say little.")
    return tuple(notes)
