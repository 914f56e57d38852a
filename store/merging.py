"""`merge`: the shards of one plan, joined into one run."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import duckdb

from moescope.core.errors import InputError, RunError
from moescope.core.json_data import to_json
from moescope.store.coverage import settle
from moescope.store.head_totals import fold_heads
from moescope.store.measured_bytes import bytes_before, note_costs
from moescope.store.merge_ledger import expectations, summary
from moescope.store.merge_memory import bounded_memory
from moescope.store.merge_plan import MergePlan, plan_merge
from moescope.store.merge_rows import copy_rows
from moescope.store.merge_shards import Shard, check_alike, read_shard
from moescope.store.merge_totals import fold_totals
from moescope.store.merge_vectors import carry_vectors, drop_vectors
from moescope.store.run import Run
from moescope.store.store import Store, check_run_name
from moescope.store.transaction import transaction


def merge(
    out: Store | str | Path,
    shards: Sequence[str | Path],
    *,
    name: str | None = None,
    run: str | None = None,
    stopped: str | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Run:
    """Join runs of parts of one plan into one run: the same rows as one recording of all of it, to the bit.

    A sequence is identified by (corpus fingerprint, sequence_id), so a batch that several shards have is taken once, and two
    equal texts stay two. Token numbers become those of the whole plan; totals are folded again from the batches' partial sums,
    in batch order; the ledger is settled over the whole plan. All of it is one transaction: a merge that fails leaves nothing.

    Args:
        out: the store to merge into, open for writing, or its path (made where it is not there).
        shards: stores with one run each, in any order.
        name: of the merged run; None for the name that all shards give theirs.
        run: name of the run to take from each shard; needed where a store has several.
        stopped: why batches are missing, if some are and the caller knows.
        facts: entries for the merged run's summary, over those found in the shards.
        progress: called with what is being done.

    Returns:
        The run: `complete` only if every batch of the plan is there and every expected event was recorded. Its `store` is
        `out`; if that was a path, close it (`run.store.close()`) once done.

    Raises:
        InputError: shards of different plans (with what differs), a shard that was killed, a name that is taken.
        StoreError: a store is missing, damaged, or in use.
        RunError: the disk failed; nothing was merged.

    Example:
        >>> import tempfile
        >>> import moescope as ms
        >>> folder, texts = Path(tempfile.mkdtemp()), ["One text.", "Another."]
        >>> with ms.Store(folder / "shard.duckdb") as store:
        ...     _ = ms.record(ms.load("demo"), texts, store, name="base", progress=False)
        >>> merged = merge(folder / "runs.duckdb", [folder / "shard.duckdb"])
        >>> merged.status, merged.rows("sequences")
        ('complete', 2)
    """
    say = progress or (lambda _: None)
    paths = [Path(path) for path in shards]
    _check_paths(out, paths)
    say("reading the shards")
    found = [read_shard(path, run) for path in paths]
    check_alike(found)
    plan = plan_merge(found)
    chosen = _name(found, name)
    with _opened(out) as store:
        _check_free(store, chosen)
        run_id = str(uuid.uuid4())
        before = bytes_before(store)
        try:
            with bounded_memory(store.connection), transaction(store.connection):
                _join(store, run_id, chosen, plan, stopped, facts or {}, say)
        except BaseException as error:
            drop_vectors(store.path, run_id)
            if isinstance(error, (duckdb.Error, OSError)):
                raise _explained(error) from error
            raise
        merged = store.run(chosen)
        seconds = float(merged.info["summary"].get("seconds", 0))
        note_costs(store, run_id, planned=None, seconds=seconds, before=before)
        return merged


def _join(
    store: Store,
    run_id: str,
    name: str,
    plan: MergePlan,
    stopped: str | None,
    facts: Mapping[str, Any],
    say: Callable[[str], None],
) -> None:
    connection = store.connection
    for step in copy_rows(connection, run_id, plan):
        say(f"copying {step}")
    for step in carry_vectors(connection, store.path, run_id, plan):
        say(step)
    say("adding up")
    fold_totals(connection, run_id, plan)
    fold_heads(connection, run_id)
    missing = plan.missing
    reason = f"{stopped}; {missing}" if missing and stopped else missing
    ledger = expectations(plan, stopped=reason)
    tokens = next((item.expected for item in ledger if item.site == "tokens"), 0)
    told = {**summary(connection, run_id, plan, tokens=tokens, stopped=reason), **facts}
    full = settle(connection, run_id, ledger)
    infos = [part.shard.info for part in plan.parts if part.taken]
    settings = {key: value for key, value in infos[0]["settings"].items() if key not in ("batches", "planned")}
    values = {
        **{key: infos[0][key] for key in ("model", "revision", "architecture", "seed", "corpus_fingerprint")},
        "run_id": run_id,
        "name": name,
        "intervention": json.dumps(infos[0]["intervention"]) if infos[0]["intervention"] else None,
        "settings": json.dumps(settings, ensure_ascii=False),
        "versions": json.dumps(infos[0]["versions"]),
        "anatomy": json.dumps(infos[0]["anatomy"], ensure_ascii=False),
        "status": "complete" if full else "incomplete",
        "started_at": min(info["started_at"] for info in infos),
        "finished_at": max(info["finished_at"] for info in infos),
        "summary": to_json(told),
    }
    names = ", ".join(f'"{column}"' for column in values)
    connection.execute(f"INSERT INTO runs ({names}) VALUES ({', '.join('?' * len(values))})", list(values.values()))


def _check_paths(out: Store | str | Path, shards: Sequence[Path]) -> None:
    if not shards:
        raise InputError("there is nothing to merge", expected="at least one shard")
    target = (out.path if isinstance(out, Store) else Path(out)).resolve()
    seen: dict[Path, Path] = {}
    for path in shards:
        if path.resolve() == target:
            raise InputError(f"{path} is both a shard and the store to merge into", fix="merge into another store")
        if path.resolve() in seen:
            raise InputError(f"{path} is given twice", fix="name every shard once")
        seen[path.resolve()] = path
    if isinstance(out, Store):
        out.check_writable()


def _name(shards: Sequence[Shard], name: str | None) -> str:
    names = list(dict.fromkeys(str(shard.info["name"]) for shard in shards))
    if name is None and len(names) > 1:
        raise InputError(
            "the merged run needs a name: the shards do not agree on one",
            found=", ".join(names[:5]) + (", …" if len(names) > 5 else ""),
            fix="give one (--name)",
        )
    chosen = names[0] if name is None else name
    check_run_name(chosen)
    return chosen


def _check_free(store: Store, name: str) -> None:
    for (status,) in store.fetch("SELECT status FROM runs WHERE name = ?", [name]):
        raise InputError(
            f"{store.path} already has a run called {name!r}", found=str(status), fix="choose another name (--name)"
        )


@contextmanager
def _opened(out: Store | str | Path) -> Iterator[Store]:
    """The store to merge into; one that was made for a merge that fails goes away again."""
    if isinstance(out, Store):
        yield out
        return
    path = Path(out)
    is_new = not path.exists()
    store = Store(path)
    try:
        yield store
    except BaseException:
        store.close()
        if is_new:
            for leftover in (path, path.with_name(path.name + ".wal")):
                with suppress(FileNotFoundError):
                    leftover.unlink()
        raise


def _explained(error: Exception) -> RunError:
    text = " ".join(str(error).split())
    full = "No space left" in text or "disk full" in text.lower()
    return RunError(
        "there is no room for the merged run" if full else "the shards could not be merged",
        found=text,
        fix=f"{'free some space and merge again' if full else 'see the cause'}; nothing was merged, the shards are as they were",
    )
