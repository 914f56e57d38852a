"""Going on with a run that was stopped: what it has, and the same sums as if it had never been."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from moescope.core.errors import InputError
from moescope.store.run import Run
from moescope.store.store import Store, remember_begun
from moescope.store.totals import ExpertPartial, LoadPartial
from moescope.store.transaction import transaction

# What may differ between the two halves of a run: it decides no row.
_FREE = {"corpus", "planned", "threads"}
_LOADS = "layer, block, label, phase, expert, tokens, weight_sum"
_EXPERTS = """layer, block, expert, tokens, weight_sum, norm_sum, weighted_norm_sum, max_abs_out, max_abs_channel,
    max_abs_token, neurons, active, zeros, expert < 0 AS shared"""
Partial = TypeVar("Partial", LoadPartial, ExpertPartial)


@dataclass
class Stopped:
    """What a stopped run has in the store: whole batches, from the first on.

    Attributes:
        run: the run.
        batches, sequences, tokens: how many of each are committed.
        generated: how many of the tokens were generated.
        state: what its probes and its problems came to at the last chunk.
        loads, experts: sums over its batches, in batch order.
        shards: site → shards of vectors it has.
        seconds: that it took so far.
    """

    run: Run
    batches: int = 0
    sequences: int = 0
    tokens: int = 0
    generated: int = 0
    state: dict[str, Any] = field(default_factory=dict)
    loads: dict[tuple[int, str, str | None, str], LoadPartial] = field(default_factory=dict)
    experts: dict[tuple[int, str, bool], ExpertPartial] = field(default_factory=dict)
    shards: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


def stopped_run(
    store: Store, name: str, plan: Mapping[str, Any], widths: Mapping[tuple[int, str], int]
) -> Stopped | None:
    """The run of this name, if it was stopped and the plan is the same; None where there is no such run.

    Args:
        store: open for writing.
        name: of the run.
        plan: `model`, `revision`, `corpus_fingerprint`, `seed` and `settings` of what is to go on.
        widths: (layer, block) → experts of each router, null ones included.

    Raises:
        InputError: another plan, or a run that is being written elsewhere.
    """
    if not store.fetch("SELECT 1 FROM runs WHERE name = ?", [name]):
        return None
    run = store.run(name)
    _check_same_plan(run, plan)
    if run.complete:
        return Stopped(run)
    batches = store.fetch("SELECT batch, sequences, tokens FROM batches WHERE run_id = ? ORDER BY batch", [run.run_id])
    if [row[0] for row in batches] != list(range(len(batches))):
        raise InputError(
            f"run {name!r} lacks batches in its middle",
            expected="whole batches from the first on",
            found=f"{len(batches)} batches, the last numbered {batches[-1][0]}",
            fix="delete it (moescope runs delete) and record it again",
        )
    if batches and "progress" not in (run.info["summary"] or {}):
        raise InputError(
            f"run {name!r} cannot go on: it was merged from shards, or its counts are not known",
            fix="delete it (moescope runs delete) and record it again, or merge the shards that are missing",
        )
    state = (run.info["summary"] or {}).get("progress", {})
    generated = store.fetch("SELECT count(*) FROM tokens WHERE run_id = ? AND phase = 'decode'", [run.run_id])[0][0]
    return Stopped(
        run,
        len(batches),
        sum(row[1] for row in batches),
        sum(row[2] for row in batches),
        int(generated),
        state.get("state", {}),
        _folded(_load_partials(store, run, widths)),
        _folded(_expert_partials(store, run, widths)),
        dict(store.fetch("SELECT site, count(*) FROM activations WHERE run_id = ? GROUP BY site", [run.run_id])),
        float(state.get("seconds", 0.0)),
    )


def reopen(store: Store, run: Run) -> None:
    """Give a stopped run the status `running` again; its ledger is written anew when it ends."""
    with transaction(store.connection):
        store.connection.execute(
            "UPDATE runs SET status = 'running', finished_at = NULL WHERE run_id = ?", [run.run_id]
        )
        store.connection.execute("DELETE FROM coverage WHERE run_id = ?", [run.run_id])
    remember_begun(run)


def _check_same_plan(run: Run, plan: Mapping[str, Any]) -> None:
    info = run.info
    before = {k: info[k] for k in ("model", "revision", "corpus_fingerprint", "seed")} | dict(info["settings"] or {})
    now = {k: plan[k] for k in ("model", "revision", "corpus_fingerprint", "seed")}
    now |= json.loads(json.dumps(dict(plan["settings"])))
    differing = sorted(k for k in {*before, *now} - _FREE if before.get(k) != now.get(k))
    if differing:
        first = differing[0]
        raise InputError(
            f"run {run.name!r} cannot go on: it was begun with another {first.replace('_', ' ')}",
            expected=f"{before.get(first)!r}",
            found=f"{now.get(first)!r}" + (f" (and others: {', '.join(differing[1:])})" if differing[1:] else ""),
            fix="give what it was begun with, or record under another name",
        )


def _load_partials(store: Store, run: Run, widths: Mapping[tuple[int, str], int]) -> Iterator[LoadPartial]:
    def made(layer: int, block: str, rows: pa.Table) -> LoadPartial:
        tokens, weights = _spread(rows, widths[layer, block], tokens=0, weight_sum=0.0)
        return LoadPartial(layer, block, rows["label"][0].as_py(), rows["phase"][0].as_py(), tokens, weights)

    yield from _partials(store, run, "load_partials", _LOADS, ("layer", "block", "label", "phase"), made)


def _expert_partials(store: Store, run: Run, widths: Mapping[tuple[int, str], int]) -> Iterator[ExpertPartial]:
    names = {"tokens": 0, "weight_sum": 0.0, "norm_sum": 0.0, "weighted_norm_sum": 0.0, "max_abs_out": -1.0}
    empty: dict[str, float] = names | {
        "max_abs_channel": -1,
        "max_abs_token": -1,
        "neurons": 0,
        "active": 0,
        "zeros": 0,
    }

    def made(layer: int, block: str, rows: pa.Table) -> ExpertPartial:
        shared = bool(rows["shared"][0].as_py())
        width = -min(rows["expert"].to_pylist()) if shared else widths[layer, block]
        partial = ExpertPartial(layer, block, *_spread(rows, width, **empty))
        partial.shared = shared
        return partial

    yield from _partials(store, run, "expert_partials", _EXPERTS, ("layer", "block", "shared"), made)


def _partials(
    store: Store,
    run: Run,
    table: str,
    columns: str,
    keys: tuple[str, ...],
    made: Callable[[int, str, pa.Table], Partial],
) -> Iterator[Partial]:
    """Partials of one batch after the other, each made of its rows by expert."""
    query = f"SELECT batch, {columns} FROM {table} WHERE run_id = ? ORDER BY batch, {', '.join(keys)}, expert"
    rows = store.sql(query, [run.run_id]).to_arrow_table()
    if not rows.num_rows:
        return
    named = [rows[name].to_pylist() for name in ("batch", *keys)]
    marks: list[tuple[Any, ...]] = list(zip(*named, strict=True))
    starts = [0, *(i for i in range(1, len(marks)) if marks[i] != marks[i - 1]), len(marks)]
    for start, end in pairwise(starts):
        part = rows.slice(start, end - start)
        yield made(part["layer"][0].as_py(), part["block"][0].as_py(), part)


def _spread(rows: pa.Table, width: int, **empty: float) -> list[Any]:
    """Columns by expert, as arrays over all experts; those without a row have the empty value."""
    expert = rows["expert"].to_numpy()
    expert = np.where(expert < 0, -1 - expert, expert)
    found = []
    for name, value in empty.items():
        given = rows[name].to_numpy()
        array = np.full(width, value, dtype=given.dtype)
        array[expert] = given
        found.append(array)
    return found


def _folded(partials: Iterator[Partial]) -> dict[Any, Partial]:
    found: dict[Any, Partial] = {}
    for partial in partials:
        if partial.key in found:
            found[partial.key].fold(partial)
        else:
            found[partial.key] = partial
    return found
