"""The shards of a merge: what each holds, and whether they belong together."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moescope.core.errors import InputError, StoreError
from moescope.store.run import Run
from moescope.store.store import Store

# What may differ between shards of one plan: where the corpus lay, which batches were asked for, what they were expected to take.
_FREE_SETTINGS = ("corpus", "batches", "planned")
_LIBRARIES = ("moescope", "torch", "transformers")
_COLUMNS = ("corpus_fingerprint", "model", "revision", "architecture", "intervention", "seed", "anatomy")


@dataclass(frozen=True)
class ShardBatch:
    """One committed batch of a shard.

    Attributes:
        number: of the batch in the plan.
        first_sequence, sequences, tokens: its first sequence, how many it has, and its unmasked tokens.
        first_token: number of its first token in the shard.
    """

    number: int
    first_sequence: int
    sequences: int
    tokens: int
    first_token: int


@dataclass(frozen=True)
class Shard:
    """A store with one run, whose batches are a part of a plan.

    Attributes:
        path: the store.
        run_id: of the run in it.
        info: its row in `runs`, JSON columns read.
        layers: rows of `layers`, as JSON, in order.
        ledger: rows of `coverage`, in order.
        batches: by number.
    """

    path: Path
    run_id: str
    info: Mapping[str, Any]
    layers: tuple[str, ...]
    ledger: tuple[Mapping[str, Any], ...]
    batches: tuple[ShardBatch, ...]

    @property
    def full(self) -> bool:
        """Whether every row of its ledger is, documents aside: a part of a corpus never has all of them."""
        return all(row["status"] == "complete" for row in self.ledger if row["site"] != "documents")

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that must agree between shards."""
        kept = {key: value for key, value in self.info["settings"].items() if key not in _FREE_SETTINGS}
        # On one machine cuda:0 and cuda:1 are alike.
        return kept | ({"device": re.sub(r":\d+", "", str(kept["device"]))} if "device" in kept else {})

    @property
    def plan_batches(self) -> int | None:
        """Batches of the whole plan, where the recorder of this shard came to its end; None where it did not."""
        known = self.info["summary"].get("plan_batches")
        if known is not None:
            return int(known)
        whole = "batches" not in self.info["settings"] and self.info["summary"].get("stopped") is None
        return self.batches[-1].number + 1 if whole and self.batches else None


def read_shard(path: Path, run: str | None) -> Shard:
    """Read what a shard is made of; its rows stay where they are.

    Args:
        path: the store.
        run: name of the run in it; None where it has only one.

    Raises:
        StoreError: no store, in use, damaged, of another version.
        InputError: several runs, a run of that name is not there, or it has no ledger.
    """
    with Store(path, read_only=True) as store:
        chosen = _chosen(store, run)
        ledger = chosen.sql(
            "SELECT site, expected, recorded, status, detail FROM coverage WHERE run_id = $run ORDER BY rowid"
        )
        rows = tuple(ledger.to_arrow_table().to_pylist())
        if not rows:
            raise InputError(
                f"{path} cannot be merged: its run {chosen.name!r} has no coverage ledger",
                found="a recording that was killed, or is not done",
                fix="complete it with profile --resume, or leave it out and record its batches again",
            )
        info = chosen.info
        if info["corpus_fingerprint"] is None:
            raise InputError(
                f"{path} cannot be merged: its run {chosen.name!r} does not say which corpus it is of",
                expected="a run with a corpus fingerprint",
            )
        layers = chosen.table("layers").order("layer, block").to_arrow_table().to_pylist()
        return Shard(
            path,
            chosen.run_id,
            info,
            tuple(json.dumps(row, sort_keys=True, default=str) for row in layers),
            rows,
            _batches(chosen),
        )


def check_alike(shards: Sequence[Shard]) -> None:
    """Refuse shards that are not of one plan, with what differs."""
    first, facts = shards[0], dict(_facts(shards[0]))
    for shard in shards[1:]:
        for name, value in _facts(shard):
            if value != facts[name]:
                raise InputError(
                    f"{shard.path} and {first.path} are not parts of one plan: their {name} differ",
                    expected=_told(facts[name], value),
                    found=_told(value, facts[name]),
                    fix="merge shards of the same corpus, model and settings only",
                )


def _facts(shard: Shard) -> Iterator[tuple[str, Any]]:
    """What must agree, by its name in messages."""
    for column in _COLUMNS:
        yield column, shard.info[column]
    yield "settings", shard.settings
    yield "versions", {name: shard.info["versions"].get(name) for name in _LIBRARIES}
    yield "layers", dict(enumerate(shard.layers))
    yield "recorded sites", dict(enumerate(row["site"] for row in shard.ledger))


def _told(value: Any, other: Any) -> str:
    """A value; of mappings the first few entries that differ."""
    if not isinstance(value, Mapping) or not isinstance(other, Mapping):
        return str(value)
    keys = [key for key in sorted({*value, *other}, key=str) if value.get(key) != other.get(key)]
    return ", ".join(f"{key}: {str(value.get(key))[:200]}" for key in keys[:3])


def _chosen(store: Store, name: str | None) -> Run:
    if name is not None:
        return store.run(name)
    runs = store.runs()
    if len(runs) != 1:
        names = ", ".join(run.name for run in runs)
        raise InputError(
            f"{store.path} is not a shard: it has {len(runs)} runs",
            expected="a store with one run",
            found=names or "none",
            fix="say which of its runs to take (--run)" if runs else "leave it out",
        )
    return runs[0]


def _batches(run: Run) -> tuple[ShardBatch, ...]:
    query = """
        SELECT
            batch,
            first_sequence,
            sequences,
            tokens,
            CAST(sum(tokens) OVER (ORDER BY batch) AS BIGINT) - tokens
        FROM batches
        WHERE run_id = $run
        ORDER BY batch
    """
    found = tuple(ShardBatch(*map(int, row)) for row in run.sql(query).fetchall())
    counted = run.sql("SELECT count(*), min(token), max(token) FROM tokens WHERE run_id = $run").fetchall()[0]
    total = sum(batch.tokens for batch in found)
    if counted != (total, 0 if total else None, total - 1 if total else None):
        raise StoreError(
            f"{run.store.path} is not whole: the tokens of run {run.name!r} are not those of its batches",
            expected=f"{total:,} tokens, numbered from 0",
            found=f"{counted[0]:,}",
            fix="record these batches again",
        )
    return found
