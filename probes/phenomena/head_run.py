"""Keeping what a protocol found about heads in a store: a run whose sequences are the protocol's prompts."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from moescope.core.errors import InputError, MoescopeError
from moescope.core.intervention import Intervention
from moescope.core.text import whole_characters
from moescope.core.versions import library_versions
from moescope.probes.claim import claimed
from moescope.probes.edits.session import interventions_in_force
from moescope.probes.failures import explained, reason_of
from moescope.probes.live_model import LiveModel
from moescope.probes.phenomena.head_scores import HeadScores
from moescope.store.coverage import Expectation
from moescope.store.ending import end_run
from moescope.store.head_totals import fold_heads
from moescope.store.run import Run
from moescope.store.store import Store, check_run_name
from moescope.store.transaction import transaction

# A sequence as it is kept: token ids, text, label.
Kept = tuple[list[int], str, str | None]

_COUNT = "SELECT count(*) FROM {} WHERE run_id = $run"


@dataclass
class HeadRun:
    """A protocol under way, with or without a store.

    Attributes:
        model: what runs.
        store, run: where it goes; None without a store.
        condition: `base`, or the name of the intervention that the model is under.
    """

    model: LiveModel
    store: Store | None
    run: Run | None
    condition: str = "base"
    _started: float = 0.0

    @classmethod
    @contextmanager
    def open(
        cls, model: LiveModel, store: Store | None, name: str, settings: dict[str, Any], *, seed: int
    ) -> Iterator[HeadRun]:
        """Enter the run, hold the model, and close the run whatever happens.

        Raises:
            InputError: a name that is taken, or a model that is being recorded.
        """
        check_run_name(name)
        with claimed(model.module, name):
            edits = _in_force(model, store)
            condition = "base" if edits is None else edits.name or "edited"
            run = _begun(model, store, name, settings, seed, edits) if store is not None else None
            this = cls(model, store, run, condition, time.perf_counter())
            try:
                yield this
            except BaseException as failure:
                if store is not None and run is not None:
                    problem = Expectation("head_sequences", 1, _COUNT.format("head_sequences"), problem=str(failure))
                    failed = not isinstance(failure, KeyboardInterrupt)
                    end_run(store, run, [problem], {"stopped": reason_of(failure)}, failed=failed)
                if isinstance(failure, MoescopeError) or not isinstance(failure, Exception):
                    raise
                raise explained(failure) from failure

    def kept(
        self, found: HeadScores, sequences: Sequence[Kept], *, summary: dict[str, Any] | None = None
    ) -> HeadScores:
        """Write scores and sequences in one transaction, settle the ledger, and give the scores with their run.

        Of a model that is being edited, every metric's condition is the intervention's name.
        """
        found = replace(found, metrics={n: replace(m, condition=self.condition) for n, m in found.metrics.items()})
        if self.store is None or self.run is None:
            return found
        rows = {
            "sequences": _sequence_rows(sequences, found),
            "head_sequences": _by_sequence(found),
        }
        connection = self.store.connection
        with transaction(connection):
            for table, part in rows.items():
                columns = ", ".join(f'"{column}"' for column in part.column_names)
                connection.register("moescope_rows", part)
                connection.execute(
                    f'INSERT INTO "{table}" (run_id, {columns}) SELECT ?, {columns} FROM moescope_rows',  # noqa: S608  names of ours
                    [self.run.run_id],
                )
                connection.unregister("moescope_rows")
            fold_heads(connection, self.run.run_id)
            digest = hashlib.sha256("".join(rows["sequences"]["content_hash"].to_pylist()).encode()).hexdigest()
            connection.execute("UPDATE runs SET corpus_fingerprint = ? WHERE run_id = ?", [digest, self.run.run_id])
        tokens = sum(len(ids) for ids, _, _ in sequences)
        seconds = time.perf_counter() - self._started
        ledger = [
            Expectation(table, expected, _COUNT.format(table))
            for table, expected in _expected(found, len(sequences)).items()
        ]
        facts = {
            "tokens": tokens,
            "sequences": len(sequences),
            "documents": len(sequences),
            "seconds": round(seconds, 3),
            "notes": list(found.notes),
            "withheld": found.withheld,
            "key_value_heads": {f"{place.layer} {place.block}": place.groups for place in found.heads.places},
            **(summary or {}),
        }
        end_run(self.store, self.run, ledger, facts, failed=False)
        return replace(found, run=self.run)


def _expected(found: HeadScores, sequences: int) -> dict[str, int]:
    """Rows that a whole protocol gives, counted from its plan."""
    told = found.told
    counted = sum(int((metric.n > 0).sum()) for metric in told)
    return {
        "sequences": sequences,
        "head_sequences": counted * len(found.heads.places),
        "heads": len(told) * found.heads.total,
    }


def _in_force(model: LiveModel, store: Store | None) -> Intervention | None:
    """The intervention that the model is under; None where it has no edits.

    Raises:
        InputError: several side by side, and a store: a run is under one.
    """
    here = interventions_in_force(model)
    if len(here) < 2:
        return here[0] if here and here[0].edits else None
    if store is not None:
        raise InputError(
            "a run is under one intervention",
            found=f"a session of {len(here)}",
            fix="enter model.edited(…) with one of them, or keep nothing (store=None)",
        )
    return Intervention(name="edited")


def _begun(
    model: LiveModel, store: Store, name: str, settings: dict[str, Any], seed: int, edits: Intervention | None
) -> Run:
    run = store.begin_run(
        name=name,
        model=model.name,
        revision=model.revision,
        architecture=model.anatomy.architecture,
        settings=settings | model.settings() | {"batch_size": 1},
        versions=library_versions(),
        seed=seed,
        intervention=None if edits is None else edits.to_json(),
        corpus_fingerprint=None,
        anatomy=model.anatomy.facts(),
    )
    columns = ("layer", "block", "stack", "kind", "n_experts", "top_k", "n_shared", "n_null", "d_expert")
    store.add_layers(run, [{column: getattr(s, column) for column in columns} for s in model.anatomy.sublayers])
    return run


def _sequence_rows(sequences: Sequence[Kept], found: HeadScores) -> pa.Table:
    hashes = [hashlib.sha256(np.array(ids, "<i8").tobytes()).hexdigest() for ids, _, _ in sequences]
    facts = [whole_characters(json.dumps(fact, ensure_ascii=False, default=str)) for fact in found.sequences]
    numbers = np.arange(len(sequences))
    return pa.table(
        {
            "sequence_id": pa.array(numbers, pa.int64()),
            "document_id": pa.array(numbers, pa.int64()),
            "part": pa.array(np.zeros_like(numbers), pa.int32()),
            "label": pa.array([label for _, _, label in sequences], pa.string()),
            "text": pa.array([text for _, text, _ in sequences], pa.string()),
            "n_tokens": pa.array([len(ids) for ids, _, _ in sequences], pa.int32()),
            "content_hash": pa.array(hashes, pa.string()),
            "metadata": pa.array(facts, pa.string()),
        }
    )


def _by_sequence(found: HeadScores) -> pa.Table:
    """A row a sequence, place and metric, for sequences that count and metrics that are told."""
    columns: dict[str, list[Any]] = {
        name: [] for name in ("sequence_id", "layer", "block", "metric", "condition", "sums", "n")
    }
    for metric in found.told:
        for sequence in np.flatnonzero(metric.n):
            for place, sums in found.heads.split(metric.sums[sequence]):
                row = (sequence, place.layer, place.block, metric.name, metric.condition, sums, metric.n[sequence])
                for name, value in zip(columns, row, strict=True):
                    columns[name].append(value)
    types = (pa.int64(), pa.uint16(), pa.string(), pa.string(), pa.string(), pa.list_(pa.float32()), pa.int64())
    return pa.table({name: pa.array(v, t) for (name, v), t in zip(columns.items(), types, strict=True)})
