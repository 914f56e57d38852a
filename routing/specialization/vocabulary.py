"""Vocabulary specialization: how far a token id alone settles the expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.routing.grid import layer_name
from moescope.routing.specialization.layer_lines import layer_lines
from moescope.routing.specialization.resampling import LINEARISED, drawn_beyond_once, linearised_interval
from moescope.routing.specialization.token_groups import (
    TokenGroups,
    group_tokens,
    log2_table,
    next_id,
    require_token_ids,
)
from moescope.routing.trace import Router, Trace, read_trace
from moescope.store.run import Run

Form = Literal["olmoe", "lrc"]
Ids = Literal["all", "input", "predicted", "next"]

_LEAST: dict[Form, int] = {"olmoe": 1, "lrc": 20}
_NAMES = {"input": "input id", "predicted": "predicted id", "next": "next id"}
FIRST, ANY = "share of the most frequent first expert", "share of the most frequent expert of the k"
_OF_EXPERT = ", ids of this expert"


@analysis(
    name="vocabulary_specialization",
    needs=("routing", "tokens"),
    source="arXiv 2409.02060 §5; arXiv 2505.16056 with ljcleo/moe-lrc",
    section="specialization",
    order=20,
)
def vocabulary_specialization(
    run: Run,
    *,
    ids: Ids = "all",
    form: Form = "olmoe",
    min_count: Count | None = None,
    shuffles: Count = 2,
    draws: Count = 1000,
    seed: Natural = 0,
) -> Result:
    """How far does a token id settle which expert is chosen?

    For every id, the share of its occurrences that go to its most frequent expert; then the unweighted mean over ids. Taken
    once with the first expert of each decision (the one of largest weight), once with any of the k. The id is that of the
    token itself (input), the one the model predicts next, or the one that does come next.

    Trap: an id that occurs once has share 1, so rare ids raise the mean whatever the router does. The OLMoE form takes every
    id; the form of the local-consistency paper (`lrc`) only those with 20 occurrences or more, and then the mean for each
    expert over the ids whose most frequent expert it is. Both are to be read against ids shuffled over the tokens.

    Args:
        ids: which id of a token; all three by default.
        form: `olmoe` for layers over all ids, `lrc` for layers and experts over ids seen often.
        min_count: fewest occurrences of an id; by default 1 in the form `olmoe` and 20 in the form `lrc`.
        shuffles: of ids over tokens, for the chance level.
        draws: bootstrap resamples of documents.
        seed: of both.

    Raises:
        InputError: the run has no such ids, or none occurs often enough.

    Example:
        >>> import tempfile, pathlib
        >>> import pyarrow as pa
        >>> import moescope as ms
        >>> trace = pa.table({"sequence_id": [0] * 4, "position": [0, 1, 2, 3], "layer": [0] * 4,
        ...                   "experts": [[0], [1], [0], [0]], "token_id": [5, 6, 5, 6]})
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = store.import_trace(trace, name="tiny", n_experts=2)
        ...     ms.analyze(run, "vocabulary_specialization", ids="input").df()["value"][0].item()  # id 5: 1, id 6: 1/2
        0.75
    """
    trace = read_trace(run)
    least = min_count or _LEAST[form]
    groups, missing = _groups(trace, ids, least)
    drawn = drawn_beyond_once(trace.n_documents, draws=draws, seed=seed)
    frames = [
        _of_router(trace, router, name, grouped, form, drawn, shuffles=shuffles, seed=seed)
        for name, grouped in groups.items()
        for router in trace.routers
    ]
    frame = pd.concat(frames, ignore_index=True)
    seen = sum(len(grouped.order) for grouped in groups.values())
    return Result(
        title=_title(frame),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=_draw,
        n=seen,
        n_unit="occurrences of ids" if len(groups) == 1 else "occurrences of ids, all kinds together",
        definition="For each id the share of its occurrences that go to its most frequent expert; unweighted mean over ids "
        f"with {least} occurrences or more. Rows with an expert: mean over the ids whose most frequent expert it is.",
        units={"value": "share of occurrences", "null": "share of occurrences", "n": "ids", "occurrences": "tokens"},
        interval=LINEARISED.format(draws=draws, fixed="; an id's most frequent expert is held fixed"),
        null=f"the same with ids shuffled over tokens, mean of {shuffles} shuffles",
        computation="ids sorted, decisions counted id by id",
        notes=(*trace.notes, *missing),
    )


def _groups(trace: Trace, ids: Ids, least: int) -> tuple[dict[str, TokenGroups], tuple[str, ...]]:
    """Tokens grouped by each kind of id asked for, and what to say of kinds that are missing."""
    asked = tuple(_NAMES) if ids == "all" else (ids,)
    require_token_ids(trace)
    keys = {"input": trace.token_id, "predicted": trace.predicted_id, "next": next_id(trace)}
    grouped = {kind: group_tokens(keys[kind]) for kind in asked}
    absent = [_NAMES[kind] for kind in asked if not len(grouped[kind].order)]
    if ids != "all" and absent:
        raise InputError(
            f"run {trace.run.name!r} has no {absent[0]} of any token",
            fix="record from a live model, or import a trace that has them; or ask for ids='input'",
        )
    enough = {kind: found.at_least(least) for kind, found in grouped.items() if len(found.order)}
    if not any(len(found.key) for found in enough.values()):
        raise InputError(f"no id occurs {least} times or more in run {trace.run.name!r}", fix="lower min_count")
    kept = {kind: found for kind, found in enough.items() if len(found.key)}
    rare = [_NAMES[kind] for kind in enough if kind not in kept]
    notes = [f"The run has no {name}." for name in absent] + [f"No {name} occurs often enough." for name in rare]
    return kept, tuple(notes)


@dataclass(frozen=True)
class _Shares:
    """[id] the most frequent expert and the share of the id's occurrences that go to it."""

    winner: NDArray[np.int64]
    share: NDArray[np.float64]


def _shares(experts: NDArray[Any], order: NDArray[np.int64], groups: TokenGroups, size: int, log2: Any) -> _Shares:
    from moescope.routing.specialization.group_kernels import group_statistics

    top, winner, _, _ = group_statistics(experts, order, groups.starts, size, log2)
    return _Shares(winner, top / groups.sizes)


def _of_router(
    trace: Trace,
    router: Router,
    kind: str,
    groups: TokenGroups,
    form: Form,
    drawn: NDArray[np.float64],
    *,
    shuffles: int,
    seed: int,
) -> pd.DataFrame:
    """All rows of one router and one kind of id."""
    log2 = log2_table(int(groups.sizes.max()))
    rows = []
    for metric, experts in ((FIRST, np.ascontiguousarray(router.experts[:, :1])), (ANY, router.experts)):
        found = _shares(experts, groups.order, groups, router.n_experts, log2)
        generator = np.random.default_rng(seed)
        null = np.mean(
            [
                _shares(experts, groups.shuffled(generator), groups, router.n_experts, log2).share.mean()
                for _ in range(shuffles)
            ]
        )
        whole = _means(trace, experts, groups, found, np.zeros(len(groups.key), np.int64), drawn)
        rows.append(whole.assign(expert=pd.NA, metric=metric, null=null))
        if form == "lrc":
            parts = _means(trace, experts, groups, found, found.winner, drawn)
            rows.append(parts.assign(metric=metric + _OF_EXPERT, null=null))
    frame = pd.concat(rows).assign(layer=router.layer, block=router.block, ids=_NAMES[kind])
    frame["expert"] = frame["expert"].astype("Int64")
    return frame[
        ["layer", "block", "expert", "ids", "metric", "value", "ci_low", "ci_high", "null", "n", "occurrences"]
    ]


def _means(
    trace: Trace,
    experts: NDArray[Any],
    groups: TokenGroups,
    found: _Shares,
    part: NDArray[np.int64],
    drawn: NDArray[np.float64],
) -> pd.DataFrame:
    """Mean share over the ids of each part, a row a part: `part` [id] says which it belongs to."""
    from moescope.routing.specialization.group_kernels import top_share_influence

    present, column, members = np.unique(part, return_inverse=True, return_counts=True)
    value = np.bincount(column, weights=found.share) / members
    influence = np.zeros((trace.n_documents, len(present)))
    top_share_influence(
        experts,
        groups.order,
        groups.starts,
        found.winner,
        value,
        1 / members[column],
        column,
        trace.document,
        influence,
    )
    low, high = linearised_interval(value, influence, drawn, most=1.0)
    occurrences = np.bincount(column, weights=groups.sizes).astype(np.int64)
    return pd.DataFrame(
        {
            "expert": present,
            "value": value,
            "ci_low": low,
            "ci_high": high,
            "n": members.astype(np.int64),
            "occurrences": occurrences,
        }
    )


def _title(frame: pd.DataFrame) -> str:
    layers = frame[frame["expert"].isna() & (frame["metric"] == FIRST)]
    shown = layers[layers["ids"] == layers["ids"].iloc[0]]
    best = shown.loc[(shown["value"] - shown["null"]).idxmax()]
    return (
        (
            f"An {best['ids']}'s most frequent expert takes {shown['value'].mean():.0%} of its occurrences, layers averaged, "
            f"and {best['value']:.0%} in {layer_name(best['layer'], best['block'])}; "
            f"with shuffled ids {shown['null'].mean():.0%} and {best['null']:.0%}"
        )
        .replace("An predicted", "A predicted")
        .replace("An next", "A next")
    )


def _draw(result: Result) -> go.Figure:
    frame = result.df()
    return layer_lines(
        frame[frame["expert"].isna()],
        series="ids",
        panel="metric",
        title_y="mean share of an id's occurrences",
        null_name="ids shuffled over tokens",
        percent=True,
    )
