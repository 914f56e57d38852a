"""Super experts: the published rules side by side, with their margins and the same rules without those they name."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.routing.context import around, pieces
from moescope.routing.phenomena.expert_names import expert_name, named
from moescope.routing.phenomena.expert_outputs import OUTPUTS_SQL, ExpertOutputs, expert_outputs
from moescope.routing.phenomena.layer_ranges import layer_ranges
from moescope.routing.phenomena.super_expert_figures import draw_super_experts
from moescope.routing.phenomena.super_expert_rules import RULES, Ruled, judge, why_not
from moescope.store.run import Run

_COLUMNS = (
    "layer", "block", "expert", "metric", "value", "rule", "round", "super_expert", "threshold", "at_percentile", "at_fraction",
    "margin", "candidates", "fails", "channel", "position", "token", "n", "context",
)  # fmt: skip


@analysis(
    name="super_experts",
    needs=("experts",),
    source="arXiv 2507.23279, Eq. 6 and Algorithm 1, and the authors' code; the variant in the code of REAP, arXiv 2510.13999",
    section="phenomena",
    order=30,
)
def super_experts(
    run: Run,
    *,
    percentile: float = 99.5,
    fraction: float = 0.1,
    share: float = 0.75,
    top: Count = 8,
    contexts: Natural = 12,
) -> Result:
    """Which experts are super experts, by which rule, and by what margin?

    a(l, e) is the largest |output| of expert e in layer l over every token routed to it and every channel, before the routing
    weight; A is the set of them. An expert is a super expert where a > P99.5(A) and a > max(A) ÷ 10 in certain layers: by the
    paper those whose block forms massive activations (here: the block's output has some, and the largest |x| of the stream
    rises in it by at least a tenth of the largest anywhere), by the authors' code those below 75 % of the layers, with A of
    these layers alone and a floor division. REAP's code takes one threshold over all layers. So an expert in the last quarter
    of the layers can be one by the paper and none by the code.

    The authors' code looks at the first routed token of each expert alone, and finds what stands on the first token of a text;
    here all tokens count, and the token of the maximum is told. Each rule is applied again without the experts it names
    (round 1): a relative rule names the largest of whatever is there, and this shows how far those of round 0 stand out.

    Args:
        percentile: of A, in percent, linearly interpolated; an expert must exceed it.
        fraction: of the largest in A, which an expert must exceed too.
        share: of the layers, where a rule looks at the first ones only.
        top: experts shown for each rule besides super experts.
        contexts: how many of the largest are shown with the text around the token of their maximum.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world, how are you?"], store, name="first", progress=False)
        ...     sorted(ms.analyze(run, "super_experts").df()["rule"].dropna().unique())
        ['REAP', 'paper', 'released']
    """
    check_thresholds(percentile, fraction, share)
    outputs = expert_outputs(run)

    def held(rule: str, without: NDArray[np.bool_] | None = None) -> Ruled | None:
        return judge(outputs, rule, percentile=percentile, fraction=fraction, share=share, without=without)

    judged = {rule: held(rule) for rule in RULES}
    again = {rule: held(rule, r.chosen) for rule, r in judged.items() if r is not None and r.chosen.any()}
    parts = [_layer_rows(outputs)]
    parts += [_rows(outputs, ruled, 0, top) for ruled in judged.values() if ruled is not None]
    parts += [_rows(outputs, ruled, 1, 1) for ruled in again.values() if ruled is not None]
    frame = pd.concat(parts, ignore_index=True).reindex(columns=list(_COLUMNS))
    for name in ("expert", "channel", "position", "token", "n", "round"):
        frame[name] = frame[name].astype("Int64")
    frame["super_expert"] = frame["super_expert"].astype("boolean")
    frame["context"] = _contexts(run, frame, contexts)
    return Result(
        title=_title(outputs, judged),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=draw_super_experts,
        n=len(outputs.frame),
        n_unit="experts",
        definition="a: largest |output| of an expert over its tokens and channels, before the routing weight; A: the set of them. "
        + " ".join(f"{rule}: {text}." for rule, text in RULES.items())
        + f" Here P is P{percentile:g}, the fraction {fraction:g} and the share {share:g}. margin: a over the larger threshold; "
        "candidates: layers the rule looks at; fails: "
        "the tests an expert does not pass; round 1: the same rule once the super experts of round 0 are taken out.",
        units={
            "value": "activation", "threshold": "activation", "at_percentile": "activation", "at_fraction": "activation",
            "margin": "a ÷ threshold", "n": "tokens",
        },
        sql=OUTPUTS_SQL,
        sql_parameters={"run": run.run_id},
        computation="percentile, fraction and layers of each rule over a",
        notes=_notes(outputs, judged, again, percentile),
    )  # fmt: skip


def check_thresholds(percentile: float, fraction: float, share: float) -> None:
    """Raise `InputError` for thresholds no expert could be held against."""
    for name, value, upper in (("percentile", percentile, 100.0), ("fraction", fraction, 1.0), ("share", share, 1.0)):
        if not (np.isfinite(value) and 0 < value <= upper):
            raise InputError(f"parameter {name!r} cannot be {value!r}", expected=f"a number over 0, up to {upper:g}")


def _rows(outputs: ExpertOutputs, ruled: Ruled, number: int, top: int) -> pd.DataFrame:
    """The super experts of a rule and the largest others, largest first."""
    frame = outputs.frame
    others = frame.index[~ruled.chosen & (ruled.in_a if number else True)][:top]
    shown = frame.loc[frame.index[ruled.chosen].union(others)]
    return shown.assign(
        metric="max |output|",
        rule=ruled.rule,
        round=number,
        super_expert=ruled.chosen[shown.index],
        threshold=ruled.threshold,
        at_percentile=ruled.percentile,
        at_fraction=ruled.fraction,
        margin=_over(shown["value"], ruled.threshold),
        candidates=layer_ranges(ruled.layers) or "none",
        fails=[why_not(ruled, row) for _, row in shown.iterrows()],
    )


def _over(value: pd.Series, threshold: float) -> pd.Series:
    """Values over a threshold; none where that is 0."""
    return value / (threshold if threshold > 0 else np.nan)


def _layer_rows(outputs: ExpertOutputs) -> pd.DataFrame:
    """The largest output of each router's experts, and their median."""
    groups = outputs.frame.groupby(["layer", "block"], sort=True)
    median = groups["value"].median().reset_index().assign(metric="median of the layer's experts")
    return pd.concat([groups.first().reset_index().assign(metric="largest of the layer"), median], ignore_index=True)


def _contexts(run: Run, frame: pd.DataFrame, contexts: int) -> list[str | None]:
    tokens = frame.loc[frame["super_expert"].notna()].sort_values("value", ascending=False)["token"].dropna().unique()
    vocabulary = pieces(run)
    texts = {int(token): around(run, int(token), vocabulary, reach=6) for token in tokens[:contexts] if token >= 0}
    return [None if pd.isna(token) else texts.get(int(token)) for token in frame["token"]]


def _title(outputs: ExpertOutputs, judged: dict[str, Ruled | None]) -> str:
    frame = outputs.frame
    found = {rule: frame[ruled.chosen] for rule, ruled in judged.items() if ruled is not None}
    largest = frame.iloc[0]
    name = expert_name(int(largest["layer"]), str(largest["block"]), int(largest["expert"]))
    ever = np.logical_or.reduce([ruled.chosen for ruled in judged.values() if ruled is not None])
    if not ever.any():
        return (
            f"No super expert by any rule; the largest output is {largest['value']:,.4g}, from {name}, "
            f"{largest['value'] / max(float(frame['value'].median()), 1e-30):,.1f}× the median expert's"
        )
    by_names: dict[str, list[str]] = {}
    for rule, part in found.items():
        by_names.setdefault(named(part) or "none", []).append(rule)
    if len(by_names) == 1:
        rules = "every rule" if len(found) == len(judged) else " and ".join(found)
        text = f"{int(ever.sum())} super expert{'s' * (int(ever.sum()) > 1)} by {rules}: {next(iter(by_names))}"
    else:
        text = "Super experts, rule by rule: " + "; ".join(
            f"{' and '.join(r)}: {names}" for names, r in by_names.items()
        )
    others = frame.loc[~ever, "value"]
    gap = float(frame.loc[ever, "value"].min() / others.max()) if len(others) and others.max() > 0 else np.nan
    least = "it is" if int(ever.sum()) == 1 else "the least of them is"
    return text + (f"; {least} {gap:,.3g}× the largest other output" if np.isfinite(gap) else "")


def _notes(
    outputs: ExpertOutputs, judged: dict[str, Ruled | None], again: dict[str, Ruled | None], percentile: float
) -> tuple[str, ...]:
    notes = list(outputs.notes)
    if outputs.forming is None:
        notes.append(
            "The paper's rule asks where massive activations form, which the run does not tell: record with the probe `residual`."
        )
    elif not outputs.forming:
        notes.append(
            "No block forms massive activations, so that no layer can hold a super expert by the paper's rule."
        )
    else:
        notes.append(f"Massive activations form in blocks {layer_ranges(outputs.forming)}.")
    for rule, ruled in judged.items():
        if ruled is None and outputs.forming:
            notes.append(f"{rule}: no layer it looks at has an expert.")
        elif ruled is not None and int(ruled.in_a.sum()) * (1 - percentile / 100) < 1:
            notes.append(
                f"{rule}: A holds {int(ruled.in_a.sum()):,} experts, so that P{percentile:g} lies between the two largest and one "
                "expert at most can exceed it; the margin over the next says whether it stands out."
            )
    for rule, ruled in again.items():
        count = 0 if ruled is None else int(ruled.chosen.sum())
        notes.append(f"{rule}, without those it names: {f'{count} more' if count else 'no more'}.")
    return tuple(notes)
