"""Retrieval heads: their scores from needle trials, how sure they are, and how stable over halves of the trials."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.core.statistics import document_weights
from moescope.routing.phenomena.head_figures import draw_heads
from moescope.routing.phenomena.head_records import HEADS_SQL, HeadRecord, condition_of, head_record, leading
from moescope.store.run import Run

SCORE, ONCE, ACTIVE = "retrieval score", "retrieval score, each place once", "retrieval activation"
GIVEN = "retrieval score, answer given"
_NULLS = {
    SCORE: "even choice of key",
    ONCE: "even choice of key, each place once",
    ACTIVE: "even choice of key, activation",
    GIVEN: "even choice of key, answer given",
}
_TRIALS_SQL = "SELECT sequence_id, metadata FROM sequences WHERE run_id = $run ORDER BY sequence_id"
_COLUMNS = (
    "layer", "block", "head", "metric", "value", "ci_low", "ci_high", "null", "retrieval_head", "strong", "of", "n"
)  # fmt: skip


@analysis(
    name="retrieval_heads",
    needs=("head_sequences",),
    source="arXiv 2404.15574, and its authors' code",
    section="phenomena",
    order=60,
)
def retrieval_heads(
    run: Run,
    *,
    threshold: float = 0.1,
    strong: float = 0.5,
    splits: Count = 200,
    draws: Count = 1000,
    seed: Natural = 0,
) -> Result:
    """Which heads look at the token that is copied from a long text into the answer?

    While the model answers a question about a needle hidden in a long text, a head scores 1/n in a decode step if the key its
    query attends to most lies among the n tokens of the needle's answer and the token written is the one there. A trial counts
    if ROUGE-1 recall of the answer is over 50 %; the score is the mean over counted trials. A retrieval head has at least 0.1.

    As published, a place credited in several steps counts several times, and a score can exceed 1; `each place once` counts it
    once. `retrieval activation` is the share of counted trials in which a head scored at all. Scores are withheld where too few
    trials counted; `answer given`, where the needle's own answer was fed, is ours and no published score, and lets models be
    looked at that do not answer.

    Trap: the authors' code searches the answer by its ids, and where the tokenizer splits it differently in its context the
    trial counts with 0 for every head, in silence; notes tell in how many prompts.

    Args:
        threshold: of a retrieval head.
        strong: of a strong one.
        splits: random halvings of the trials for the split-half correlation.
        draws: bootstrap resamples of trials.
        seed: of both.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> from moescope.probes.phenomena.retrieval import retrieval_heads
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     found = retrieval_heads(ms.load("demo"), lengths=[160], depths=[0.5], needles=1, steps=4, store=store, progress=False)
        ...     ms.analyze(found.run, "retrieval_heads").title.split(":")[0]
        'No retrieval score'
    """
    if not 0 < threshold <= strong:
        raise InputError(
            "thresholds must rise", expected="0 < threshold ≤ strong", found=f"{threshold:g} and {strong:g}"
        )
    trials = [json.loads(text) if text else {} for _, text in run.store.fetch(_TRIALS_SQL, {"run": run.run_id})]
    trials = [trial for trial in trials if "counted" in trial]
    withheld = run.info["summary"].get("withheld") or {}
    levels = (("retrieval heads", "retrieval_head", threshold), ("strong retrieval heads", "strong", strong))
    parts, shown = [], None
    for metric in (SCORE, ONCE, ACTIVE, GIVEN):
        record = None if metric in withheld else head_record(run, metric)
        if record is None:
            continue
        null = head_record(run, _NULLS[metric])
        part = record.frame(metric, draws=draws, seed=seed, null=None if null is None else null.value)
        if metric != ACTIVE:
            part["retrieval_head"] = part["value"] >= threshold
            part["strong"] = part["value"] >= strong
        parts += [part, *([] if metric == ACTIVE else [_whole(record, part, metric, levels, splits, draws, seed)])]
        shown = part if shown is None else shown
    if shown is None:
        raise InputError(
            f"run {run.name!r} holds no retrieval score of any head",
            found=next(iter(withheld.values()), "no needle trials"),
            fix="run them: moescope phenomena MODEL, or moescope.probes.phenomena.retrieval.retrieval_heads(model, store=store)",
        )
    told = str(shown["metric"].iloc[0])
    frame = pd.concat(parts, ignore_index=True).reindex(columns=list(_COLUMNS))
    for name in ("layer", "head", "n"):
        frame[name] = frame[name].astype("Int64")
    for name in ("retrieval_head", "strong"):
        frame[name] = frame[name].astype("boolean")
    return Result(
        title=_title(shown, trials, withheld, threshold),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=draw_heads,
        n=int(shown["n"].max()),
        n_unit="trials",
        definition="retrieval score: mean over counted trials of (decode steps in which the head's top key lies in the answer and "
        "the token written is the one there) ÷ tokens of the answer; each place once: share of the answer's tokens so credited; "
        f"retrieval activation: share of counted trials with a score over 0; a retrieval head has ≥ {threshold:g}, a strong one "
        f"≥ {strong:g}; split-half correlation: Pearson's r between the heads' scores on two random halves of the trials; answer "
        "given: the same with the needle's own answer fed, over all trials (not the published score).",
        units={
            "value": "score",
            f"value[{ACTIVE}]": "share of trials",
            "value[share of retrieval heads]": "share of heads",
            "value[share of strong retrieval heads]": "share of heads",
            "value[split-half correlation]": "Pearson's r",
            "n": "trials; heads for shares of heads",
        },
        interval=f"95 % percentile bootstrap over trials, {draws} resamples; split-half correlation: 2.5th to 97.5th percentile of "
        f"{splits} random halvings",
        null="the score expected of a head whose top key is drawn evenly from all that its query can see",
        sql=HEADS_SQL,
        sql_parameters={"run": run.run_id, "metric": told, "condition": condition_of(run, told)},
        computation="means over trials of the query's rows; bootstrap and halvings",
        notes=_notes(run, trials, withheld),
    )


def _whole(
    record: HeadRecord,
    part: pd.DataFrame,
    metric: str,
    levels: Sequence[tuple[str, str, float]],
    splits: int,
    draws: int,
    seed: int,
) -> pd.DataFrame:
    """Rows about all heads: how many pass, and how alike two halves of the trials are."""
    weights = document_weights(record.documents, draws=draws, seed=seed).astype(np.float64)
    drawn = (weights @ record.sums) / np.maximum(weights @ record.n, 1)
    rows: list[dict[str, Any]] = []
    for label, column, level in levels:
        low, high = np.percentile((drawn >= level).mean(1), [2.5, 97.5]) if record.documents > 1 else (np.nan, np.nan)
        by_chance = (part["null"] >= level).mean() if "null" in part else np.nan
        rows.append(
            {
                "metric": f"share of {label}", "of": metric, "value": part[column].mean(), "ci_low": low, "ci_high": high,
                "null": by_chance, "n": len(part),
            }
        )  # fmt: skip
    halves = split_half(record, splits=splits, seed=seed)
    if halves is not None:
        middle, low, high = halves
        rows.append(
            {
                "metric": "split-half correlation", "of": metric, "value": middle, "ci_low": low, "ci_high": high,
                "n": record.documents,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def split_half(record: HeadRecord, *, splits: int, seed: int) -> tuple[float, float, float] | None:
    """Pearson's r between the heads' means over two random halves of the trials: mean, 2.5th and 97.5th percentile.

    None with fewer than four trials, or where every head scores alike.
    """
    if record.documents < 4:
        return None
    random = np.random.default_rng(seed)
    found = []
    for _ in range(splits):
        order = random.permutation(record.documents)
        half = record.documents // 2
        one, other = (_means(record, rows) for rows in (order[:half], order[half : 2 * half]))
        if one.std() > 0 and other.std() > 0:
            found.append(float(np.corrcoef(one, other)[0, 1]))
    if not found:
        return None
    low, high = np.percentile(found, [2.5, 97.5])
    return float(np.mean(found)), float(low), float(high)


def _means(record: HeadRecord, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    means: NDArray[np.float64] = record.sums[rows].sum(0) / np.maximum(record.n[rows].sum(0), 1)
    return means


def _title(shown: pd.DataFrame, trials: list[dict[str, Any]], withheld: dict[str, str], threshold: float) -> str:
    metric, counted = str(shown["metric"].iloc[0]), sum(bool(t["counted"]) for t in trials)
    told = f"{counted} of {len(trials)} trials counting" if trials else f"{shown['n'].max()} trials"
    found = shown[shown["retrieval_head"].astype(bool)]
    if metric == SCORE and found.empty:
        return f"No retrieval head ({told}): none of {len(shown)} heads reaches {threshold:g}; the highest is {leading(shown, 1)}"
    if metric == SCORE:
        share = f"{len(found)} of {len(shown)} heads ({len(found) / len(shown):.1%}) are retrieval heads"
        return f"{share}, {told}: {leading(found, 5)}"
    why = f"{counted} of {len(trials)} trials counted" if withheld else "it was not measured"
    rest = f"none of {len(shown)} heads reaches" if found.empty else f"{len(found)} of {len(shown)} heads reach"
    return f"No retrieval score: {why}; with the answer given, {rest} {threshold:g} ({leading(shown, 3)})"


def _notes(run: Run, trials: list[dict[str, Any]], withheld: dict[str, str]) -> tuple[str, ...]:
    notes = [str(note) for note in run.info["summary"].get("notes") or []]
    notes += [f"Withheld: {reason}." for reason in dict.fromkeys(withheld.values())]
    exact = sum(bool(trial.get("exact")) for trial in trials)
    return (*notes, *([f"The answer stands word by word in {exact} of {len(trials)} responses."] if trials else []))
