"""Scores of descriptions, each beside what chance and another unit's description reach."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.sae.concepts.causal import causal_score, log_p_lost, taken_out, token_ids
from moescope.sae.concepts.counting import Count
from moescope.sae.concepts.description_job import Job, Scored
from moescope.sae.concepts.judging import Item, Score, detection_items, fuzzing_items, judge
from moescope.sae.concepts.prompts import read_words, tokens_prompt
from moescope.sae.concepts.windows import Window, active_windows, idle_windows
from moescope.store.sae_rows import write_rows

CHANCE, ANOTHER = "chance", "another unit's description"

_SCORED_SQL = """
    SELECT DISTINCT description_id::VARCHAR, metric
    FROM description_scores
    WHERE description_id::VARCHAR IN (SELECT unnest($ids))
"""


def score_all(
    job: Job, ids: Mapping[int, str], texts: Mapping[int, str], scores: list[Scored], count: Count
) -> list[dict[str, Any]]:
    """Score what has no score yet; each unit's rows are written at once."""
    listed = sorted(texts)
    done = set(job.store.sql(_SCORED_SQL, {"ids": list(ids.values())}).fetchall()) if ids and scores else set()
    named: dict[int, NDArray[np.int64]] = {}
    rows = []
    for number, unit in enumerate(listed):
        # The next unit whose description says something else: two units may be described alike.
        turned = [*listed[number + 1 :], *listed[:number]]
        other = next((one for one in turned if texts[one] != texts[unit]), None)
        wanted = [score for score in scores if (ids[unit], score) not in done]
        found = _score_one(job, unit, other, texts, wanted, named) if wanted else []
        write_rows(job.store, {"description_scores": [row | {"description_id": ids[unit]} for row in found]})
        rows += [row | {"description_id": ids[unit], "unit": unit} for row in found]
        count()
    return rows


def _score_one(
    job: Job,
    unit: int,
    other: int | None,
    texts: Mapping[int, str],
    wanted: list[Scored],
    named: dict[int, NDArray[np.int64]],
) -> list[dict[str, Any]]:
    without = job.shown.get(unit, frozenset())
    random = job.random(unit, 1)
    active = active_windows(
        job.activity, unit, count=job.judged, width=job.width, top=0, random=random, without=without
    )
    rows: list[dict[str, Any]] = []
    for score in wanted:
        if score == "causal":
            rows += _causal(job, unit, other, texts, active, named)
            continue
        if score == "detection":
            half = job.judged // 2
            idle = idle_windows(job.activity, unit, count=half, width=job.width, random=random, without=without)
            items = detection_items(active[:half], idle, random)
        else:
            items = fuzzing_items(active, random)
        rows += _judged(job, score, items, texts[unit], None if other is None else texts[other])
    return rows


def _judged(job: Job, metric: str, items: list[Item], own: str, other: str | None) -> list[dict[str, Any]]:
    if len(items) < 4:
        return []
    marks = metric == "fuzzing"
    found = judge(job.asker, own, items, job.words, marks=marks, draws=job.draws, seed=job.seed)
    nulls: dict[str, float | None] = {CHANCE: 0.5}
    if other is not None:
        control = judge(job.asker, other, items, job.words, marks=marks, draws=0, seed=job.seed)
        if control.value is not None:
            nulls[ANOTHER] = control.value
    rows = _rows(job, metric, found, nulls)
    return [*rows, _row(job, f"{metric}_unread", float(found.unread), n=len(items))] if found.unread else rows


def _causal(
    job: Job,
    unit: int,
    other: int | None,
    texts: Mapping[int, str],
    active: list[Window],
    named: dict[int, NDArray[np.int64]],
) -> list[dict[str, Any]]:
    assert job.model is not None
    for one in (unit, other):
        if one is not None and one not in named:
            words = job.asker.ask(tokens_prompt(texts[one]), read_words, bool)
            named[one] = token_ids(job.model, words or [])
    lists = {one: named[one] for one in (unit, other) if one is not None and len(named[one])}
    if unit not in lists or not active:
        return []
    cut = taken_out(job.kind, unit, sae=job.sae, layer=job.layer, block=job.block or "mlp")
    sources = {"described": job.sae} if job.sae is not None else None
    sums, counts, documents = log_p_lost(job.model, job.activity, active, cut, lists, sources=sources)
    found = causal_score(sums[unit], counts, documents, draws=job.draws, seed=job.seed)
    nulls: dict[str, float | None] = {}
    if other in lists:
        nulls[ANOTHER] = float(sums[other].sum() / counts.sum()) if counts.sum() else None
    return _rows(job, "causal", found, nulls or {"": None})


def _rows(job: Job, metric: str, score: Score, nulls: Mapping[str, float | None]) -> list[dict[str, Any]]:
    if score.value is None:
        return []
    return [
        _row(job, metric, score.value, n=score.judged)
        | {"ci_low": score.low, "ci_high": score.high, "null_value": null, "null_kind": kind or None}
        for kind, null in nulls.items()
    ]


def _row(job: Job, metric: str, value: float, *, n: int) -> dict[str, Any]:
    return {"metric": metric, "value": value, "n": n, "scorer": job.describer}
