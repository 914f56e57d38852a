"""Many runs side by side: a row a run, a column a measure, the best marked where runs can be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from moescope.core.html import cell
from moescope.core.statistics import document_weights
from moescope.report.document import Block, Cell, Grid, Heading, Paragraph
from moescope.report.summary import span
from moescope.routing.comparison.sequence_sums import UNITS, load_variation, sequence_sums
from moescope.store.run import Run

Better = Literal["less", "more", "neither"]
BETTER: dict[str, Better] = {
    "mean NLL": "less",
    "next token predicted": "more",
    "router entropy": "neither",
    "router margin": "neither",
    "weight of the first choice": "neither",
    "expert output norm": "neither",
    "residual norm": "neither",
    "attention to the first token": "neither",
    "CV of expert load": "less",
}
"""For each measure, which way is better."""
_DRAWS, _SEED, _BUNDLES = 500, 0, 2000


@dataclass(frozen=True)
class Entry:
    """One measure of one run; bounds are None where the measure has no interval."""

    run: str
    metric: str
    value: float
    ci_low: float | None
    ci_high: float | None
    n: int


def measured(run: Run) -> list[Entry]:
    """Every measure of a run, over all its texts, with a 95 % percentile bootstrap over documents.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world."], store, name="first", progress=False)
        ...     [entry.metric for entry in measured(run)][:2]
        ['mean NLL', 'next token predicted']
    """
    sums = sequence_sums(run)
    documents = dict(run.store.fetch("SELECT sequence_id, document_id FROM sequences WHERE run_id = ?", [run.run_id]))
    found = {name: _entry(run, str(name), part, documents) for name, part in sums.groupby("metric")}
    loads = load_variation(run)
    if len(loads):
        n = int(loads["n"].sum())
        found["CV of expert load"] = Entry(run.name, "CV of expert load", float(loads["value"].mean()), None, None, n)
    return [found[name] for name in UNITS if name in found]


def _entry(run: Run, metric: str, part: pd.DataFrame, documents: dict[int, int]) -> Entry:
    unit = part["sequence_id"].map(documents)
    known, place = np.unique(unit.to_numpy(), return_inverse=True)
    if len(known) > _BUNDLES:  # many documents are bundled, as comparisons of runs do
        place = (np.random.default_rng(_SEED).permutation(len(known)) % _BUNDLES)[place]
    count = int(place.max()) + 1
    total = np.bincount(place, part["total"].to_numpy(float), count)
    n = np.bincount(place, part["n"].to_numpy(float), count)
    low = high = None
    if count > 1:
        weights = document_weights(count, draws=_DRAWS, seed=_SEED).astype(float)
        below = weights @ n
        drawn = np.divide(weights @ total, below, out=np.full(_DRAWS, np.nan), where=below > 0)
        low, high = (float(bound) for bound in np.nanquantile(drawn, [0.025, 0.975]))
    return Entry(run.name, metric, float(total.sum() / n.sum()), low, high, int(n.sum()))


def labels_of(runs: Sequence[Run]) -> list[str]:
    """A name for each run that no other has.

    Where two have one name, with the file of its store; where these are called alike too, with the folder; else numbered.
    """
    labels = [run.name for run in runs]
    for parts in (1, 2):
        labels = [
            label if labels.count(label) == 1 else f"{run.name} ({'/'.join(run.store.path.resolve().parts[-parts:])})"
            for label, run in zip(labels, runs, strict=True)
        ]
    found: list[str] = []
    for run, label in zip(runs, labels, strict=True):
        numbered = (f"{run.name} ({number})" for number in range(2, len(runs) + 2))
        found.append(label if label not in found else next(one for one in numbered if one not in found))
    return found


def leaderboard_blocks(runs: Sequence[Run]) -> tuple[list[Block], list[dict[str, Any]]]:
    """The leaderboard as blocks, and as data."""
    labels = labels_of(runs)
    board = [{entry.metric: entry for entry in measured(run)} for run in runs]
    metrics = [name for name in UNITS if any(name in row for row in board)]
    groups = [_ground(run) for run in runs]
    reference = max(groups, key=groups.count)
    best = {metric: _best(metric, board, groups) for metric in metrics}
    rows = []
    for label, run, row, ground in zip(labels, runs, board, groups, strict=True):
        flag = "" if ground == reference else " ⚠ other texts"
        cells = [Cell(label, strong=True), Cell(run.model), Cell(_tokens(run) + flag, _token_count(run))]
        cells += [_cell(row.get(metric), best[metric].get(id(row), "")) for metric in metrics]
        rows.append(cells)
    names = [f"{metric} ({UNITS[metric]}; better: {BETTER[metric]})" for metric in metrics]
    numeric = frozenset(range(2, 3 + len(metrics)))
    blocks: list[Block] = [
        Heading("Leaderboard", "leaderboard"),
        Grid(("run", "model", "tokens", *names), rows, numeric, sortable=True),
        Paragraph(
            "● best: its interval lies apart from that of every other run on the same texts; ≈ best so far: the best number, but "
            "intervals overlap, so no difference is claimed. Only runs on the same texts, cut into the same tokens, are ranked against "
            "each other; a measure for which neither more nor less is better has no best, nor has one without an interval a mark "
            "of more than ≈. In brackets: 95 % percentile bootstrap over documents, "
            f"{_DRAWS} resamples. CV of expert load: standard deviation of the experts' tokens over their mean, a mean over layers; "
            "less is evener, which says nothing of quality.",
            "muted",
        ),
    ]  # fmt: skip
    if len(set(groups)) > 1:
        blocks.append(
            Paragraph(
                "⚠ Not all runs are of the same texts, cut into the same tokens: numbers across them are not comparable "
                "(NLL is in nats per token, and tokenizers cut texts differently).",
                "warning",
            )
        )
    data = [
        {
            **{name: getattr(entry, name) for name in ("metric", "value", "ci_low", "ci_high", "n")},
            "run": label,
            "unit": UNITS[entry.metric],
            "better": BETTER[entry.metric],
            "mark": best[entry.metric].get(id(row), ""),
            "same_texts": ground == reference,
        }
        for label, row, ground in zip(labels, board, groups, strict=True)
        for entry in row.values()
    ]
    return blocks, data


def _ground(run: Run) -> str:
    """What a run's measures are of: its sequences as token ids, in order; of a run that does not tell them, itself alone."""
    rows = run.store.fetch(
        "SELECT content_hash, n_tokens FROM sequences WHERE run_id = ? ORDER BY sequence_id", [run.run_id]
    )
    if run.info["corpus_fingerprint"] is None or any(None in row for row in rows):
        return run.run_id
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _token_count(run: Run) -> int:
    return run.rows("tokens")


def _tokens(run: Run) -> str:
    return f"{_token_count(run):,}"


def _best(metric: str, board: list[dict[str, Entry]], groups: list[str]) -> dict[int, str]:
    """Which rows are marked, and how."""
    sign = {"less": 1, "more": -1, "neither": 0}[BETTER[metric]]
    if not sign:
        return {}
    marks: dict[int, str] = {}
    for group in set(groups):
        members = [row for row, ground in zip(board, groups, strict=True) if ground == group and metric in row]
        if len(members) < 2:
            continue
        first = min(members, key=lambda row: sign * row[metric].value)
        others = [row[metric] for row in members if row is not first]
        mark = "●" if all(_apart(first[metric], other) for other in others) else "≈"
        marks |= {id(row): mark for row in members if row[metric].value == first[metric].value}
    return marks


def _apart(one: Entry, other: Entry) -> bool:
    if one.ci_low is None or one.ci_high is None or other.ci_low is None or other.ci_high is None:
        return False
    return one.ci_high < other.ci_low or other.ci_high < one.ci_low


def _cell(entry: Entry | None, mark: str) -> Cell:
    if entry is None:
        return Cell("—")
    interval = "" if entry.ci_low is None else f" ({span(entry.ci_low, entry.ci_high)})"
    return Cell(f"{mark} {cell(entry.value)}{interval}".strip(), entry.value, strong=bool(mark))
