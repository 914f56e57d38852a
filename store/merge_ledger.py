"""The ledger and the summary of a merged run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import duckdb

from moescope.core.errors import InputError
from moescope.store.coverage import Expectation
from moescope.store.merge_plan import MergePlan, Part

# What is counted anew in the merged rows. All else was counted in the committed rows of the shards, which are copied as they are.
_COUNTED = {
    "documents": "SELECT count(DISTINCT document_id) FROM sequences WHERE run_id = $run",
    "sequences": "SELECT count(*) FROM sequences WHERE run_id = $run",
    "tokens": "SELECT count(*) FROM tokens WHERE run_id = $run",
    "tokens.nll": "SELECT count(nll) FROM tokens WHERE run_id = $run",
}
_SHAPE = """
    SELECT
        count(*),
        count(*) FILTER (part = 1),
        count(*) FILTER (n_tokens = 1),
        coalesce(sum(n_tokens), 0)
    FROM sequences
    WHERE run_id = $run
"""
_OF_THE_CORPUS = ("documents", "skipped_records", "first_skipped", "left_out")
_ADDED = ("seconds", "near_ties", "near_ties_by_router")
_SHARES = ("rule_agreement_by_router",)
# Counted in the merged rows, or said of one recording only.
_COUNTED_ANEW = {
    "planned",
    "actual",
    "progress",
    "resumed_at_batch",
    "tokens",
    "generated_tokens",
    "sequences",
    "tokens_per_second",
    "split_documents",
    "single_token_sequences",
    "plan_batches",
    "stopped",
}


def expectations(plan: MergePlan, *, stopped: str | None) -> list[Expectation]:
    """What every site of the merged run must give.

    A shard of which all batches are taken adds its own ledger. One of which some are taken, or which was interrupted so that
    it expected more than it committed, adds its share: events a token (or sequence) times tokens taken.

    Args:
        plan: the merge.
        stopped: why parts of the plan are missing.

    Raises:
        InputError: a shard with gaps overlaps another in part, and nobody could say on which side the gaps lie.
    """
    parts = [part for part in plan.parts if part.taken]
    found = []
    for number, row in enumerate(parts[0].shard.ledger):
        site = str(row["site"])
        shares = [_share(part, part.shard.ledger[number]) for part in parts]
        problems = dict.fromkeys(p for part in parts if (p := _problem(part, part.shard.ledger[number])))
        expected, recorded = (sum(share[i] for share in shares) for i in (0, 1))
        if site == "documents":
            expected = int(parts[0].shard.info["summary"]["documents"])
            problems = {stopped: None} if stopped else {}
        query = _COUNTED.get(site, f"SELECT {recorded}")
        found.append(Expectation(site, expected, query, problem="; ".join(problems) or None))
    return found


def summary(
    connection: duckdb.DuckDBPyConnection, run_id: str, plan: MergePlan, *, tokens: int, stopped: str | None
) -> dict[str, Any]:
    """Facts of the merged run: counted in its rows where these tell, otherwise put together from those of the shards."""
    parts = [part for part in plan.parts if part.taken]
    given = [part.shard.info["summary"] for part in parts]
    sequences, split, single, prompt = connection.execute(_SHAPE, {"run": run_id}).fetchall()[0]
    seconds = sum(s.get("seconds", 0) for s in given)
    found: dict[str, Any] = {
        "tokens": tokens,
        "generated_tokens": tokens - int(prompt),
        "sequences": sequences,
        "tokens_per_second": round(tokens / max(seconds, 1e-9), 1),
        "split_documents": split,
        "single_token_sequences": single,
        "stopped": stopped,
        "resumed_at_batch": None,
    }
    if stopped is not None:
        found["plan_batches"] = plan.plan_batches  # for a later merge with what is missing
    mean = partial(_mean, tokens=[sum(batch.tokens for batch in part.taken) for part in parts])
    unknown = []
    for key in dict.fromkeys(key for s in given for key in s if key not in _COUNTED_ANEW):
        values = [s.get(key) for s in given]
        whole = not any(part.left for part in parts)
        if key in _OF_THE_CORPUS and all(value == values[0] for value in values):
            found[key] = values[0]
        elif key in _ADDED and (whole or key == "seconds"):
            found[key] = _together(values, sum)
        elif key in _SHARES and whole:
            found[key] = _together(values, mean)
        else:
            unknown.append(key)
    return found | ({"not_merged": unknown} if unknown else {})


def _share(part: Part, row: Mapping[str, Any]) -> tuple[int, int]:
    """Events expected of and recorded in the batches taken from a shard, by one row of its ledger."""
    site, expected, recorded = str(row["site"]), int(row["expected"]), int(row["recorded"])
    told = {r["site"]: int(r["expected"]) for r in part.shard.ledger}
    there = tuple(sum(getattr(b, name) for b in part.shard.batches) for name in ("tokens", "sequences"))
    taken = tuple(sum(getattr(b, name) for b in part.taken) for name in ("tokens", "sequences"))
    ledger = (told.get("tokens", there[0]), told.get("sequences", there[1]))
    if site == "documents" or (ledger == there == taken):
        return expected, recorded
    each = _each(site, expected, *ledger)
    if each is None:
        if taken == there:
            return expected, recorded
        raise _inseparable(part, site)
    if taken == there:
        return each * _units(site, *taken), recorded
    if recorded != each * _units(site, *there):
        raise _inseparable(part, site)
    return (each * _units(site, *taken),) * 2


def _each(site: str, expected: int, tokens: int, sequences: int) -> int | None:
    """Events that one unit must give; None where that is no whole number."""
    units = _units(site, tokens, sequences)
    if site.endswith(" vectors"):
        return None  # of a sample
    return expected // max(units, 1) if expected % max(units, 1) == 0 else None


def _units(site: str, tokens: int, sequences: int) -> int:
    """What a site's events are counted by: tokens, sequences, or tokens that something stands before."""
    if site == "sequences" or site.endswith(" median"):
        return sequences
    return tokens - sequences if site == "tokens.nll" else tokens


def _inseparable(part: Part, site: str) -> InputError:
    return InputError(
        f"{part.shard.path} overlaps other shards in part, and its records at {site} have gaps or are a sample",
        expected=f"shards without a batch in common: {len(part.left)} of its {len(part.shard.batches)} are in others",
        fix="leave it out and record the batches that are then missing, or leave out the others",
    )


def _problem(part: Part, row: Mapping[str, Any]) -> str | None:
    """What a shard's ledger holds against its records, unless only batches that were never committed are short."""
    if row["status"] == "complete":
        return None
    expected, recorded = _share(part, row)
    if row["status"] != "invalid" and expected == recorded:
        return None
    return str(row["detail"]) if row["status"] == "invalid" else f"{part.shard.path.name}: {row['detail']}"


def _together(values: list[Any], join: Callable[[list[Any]], Any]) -> Any:
    """Join numbers, or mappings of numbers key by key; what a shard lacks counts as nothing."""
    if any(isinstance(value, Mapping) for value in values):
        keys = dict.fromkeys(key for value in values for key in value or {})
        return {key: _together([(value or {}).get(key) for value in values], join) for key in keys}
    found = join([value or 0 for value in values])
    return round(found, 3) if isinstance(found, float) and join is sum else found


def _mean(shares: list[float], tokens: list[int]) -> float:
    """Share over all tokens, from those of parts: exact, since every one was a quotient of whole numbers."""
    return sum(round(share * n) for share, n in zip(shares, tokens, strict=True)) / max(sum(tokens), 1)
