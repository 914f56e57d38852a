"""`Trace`: the decisions of one run as arrays, for what SQL cannot say in one query."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.routing.grid import layer_name
from moescope.store.run import Run
from moescope.store.store import Store

Ints = NDArray[np.integer[Any]]
Floats = NDArray[np.floating[Any]]

_TOKENS = """
    SELECT t.token, t.sequence_id, t.position, t.token_id, t.predicted_id, t.phase = 'decode' AS decode
    FROM tokens t
    WHERE t.run_id = $run
    ORDER BY t.token
"""
_SEQUENCES = """
    SELECT sequence_id, document_id, label
    FROM sequences
    WHERE run_id = $run
    ORDER BY sequence_id
"""
_ROUTERS = """
    SELECT layer, block, n_experts, coalesce(n_null, 0), top_k
    FROM layers
    WHERE run_id = $run AND n_experts > 0 AND kind = 'moe'
    ORDER BY layer, block
"""
_DECISIONS = """
    SELECT token, experts
    FROM routing
    WHERE run_id = $run AND layer = $layer AND block = $block
    ORDER BY token
"""
_WEIGHTS = """
    SELECT token, weights
    FROM routing
    WHERE run_id = $run AND layer = $layer AND block = $block
    ORDER BY token
"""
_ANY_WEIGHT = "SELECT 1 FROM routing WHERE run_id = $run AND weights IS NOT NULL LIMIT 1"
# Traces of the runs looked at last, so that ten questions to one run read its decisions once.
_KEPT = 2
_kept: WeakKeyDictionary[Store, OrderedDict[tuple[str, str], dict[str, Any]]] = WeakKeyDictionary()
_lock = threading.Lock()


@dataclass(frozen=True)
class Router:
    """One router and the decisions it took.

    Attributes:
        layer, block: where it is.
        n_experts: experts it chooses from, null experts included; `n_null` of them compute nothing.
        experts: [token, k] uint16, in slot order (weight descending).
    """

    layer: int
    block: str
    n_experts: int
    n_null: int
    experts: NDArray[np.uint16]

    @property
    def top_k(self) -> int:
        """Experts chosen for each token."""
        return int(self.experts.shape[1])

    @property
    def name(self) -> str:
        """`L3`, or `L3 attn` where the router is not the layer's MLP."""
        return layer_name(self.layer, self.block)


@dataclass(frozen=True)
class Trace:
    """The decisions of a run, token by token in the order of the run: sequences lie one after another.

    Only tokens for which every router has one whole decision in range are kept; `dropped` counts the others.

    Attributes:
        run: where it was read.
        routers: by layer and block.
        token: [token] row number in the run's tables.
        sequence: [token] index into `sequence_ids`, `documents`, `labels`; ascending.
        position: [token] within its sequence.
        token_id, predicted_id: [token]; −1 where the run has none.
        decode: [token] whether the token was generated.
        starts: [sequence + 1] first row of each sequence; the last entry is the number of tokens.
        sequence_ids: [sequence] as stored.
        documents: [sequence] index of the document, 0-based and dense.
        labels: [sequence] index into `label_names`; −1 for none.
        dropped: tokens left out.
    """

    run: Run
    routers: tuple[Router, ...]
    token: NDArray[np.int64]
    sequence: NDArray[np.int32]
    position: NDArray[np.int32]
    token_id: NDArray[np.int32]
    predicted_id: NDArray[np.int32]
    decode: NDArray[np.bool_]
    starts: NDArray[np.int64]
    sequence_ids: NDArray[np.int64]
    documents: NDArray[np.int32]
    labels: NDArray[np.int32]
    label_names: tuple[str, ...]
    dropped: int

    @property
    def tokens(self) -> int:
        """How many tokens it holds."""
        return len(self.token)

    @property
    def decisions(self) -> int:
        """Tokens × routers × k."""
        return sum(router.experts.size for router in self.routers)

    @property
    def n_documents(self) -> int:
        """How many documents the tokens come from."""
        return int(self.documents.max(initial=-1)) + 1

    @cached_property
    def document(self) -> NDArray[np.int32]:
        """[token] index of the document."""
        return self.documents[self.sequence]

    @cached_property
    def label(self) -> NDArray[np.int32]:
        """[token] index into `label_names`; −1 for none."""
        return self.labels[self.sequence]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of a result must know of tokens left out."""
        return (f"{self.dropped:,} tokens without a whole decision are left out.",) if self.dropped else ()

    def weights(self, router: Router) -> NDArray[np.float32]:
        """[token, k] weights given to the experts; NaN where the run has none."""
        found = self.run.sql(_WEIGHTS, {"layer": router.layer, "block": router.block}).to_arrow_table()
        rows, listed = np.asarray(found.column(0)), found.column(1).combine_chunks()
        whole = np.asarray(listed.value_lengths().fill_null(0)) == router.top_k
        weights = np.full((len(rows), router.top_k), np.nan, np.float32)
        values = listed.filter(pa.array(whole)).flatten().to_numpy(zero_copy_only=False)
        weights[whole] = values.reshape(-1, router.top_k)
        return weights[np.searchsorted(rows, self.token)]

    def require_weights(self) -> None:
        """Raise `InputError` where the run has no routing weights, as some imported traces."""
        if not self.run.sql(_ANY_WEIGHT).fetchall():
            raise InputError(
                f"run {self.run.name!r} has no routing weights",
                found="decisions without weights, as imported",
                fix="import a trace that has weights, or record from a live model",
            )

    def require_labels(self) -> None:
        """Raise `InputError` where no document has a label."""
        if not self.label_names:
            raise InputError(
                f"run {self.run.name!r} has no labels",
                expected="documents of at least two labels",
                fix='give documents a "label" (--label-field), and record again',
            )


def read_trace(run: Run) -> Trace:
    """The run's decisions as arrays; what was read last is kept.

    Raises:
        InputError: the run has no routing, or not one token with a decision of every router.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world."], store, name="first", progress=False)
        ...     read_trace(run).routers[0].experts.shape
        (7, 2)
    """
    key = (run.run_id, run.status)
    with _lock:
        kept = _kept.setdefault(run.store, OrderedDict())
        if key in kept:
            kept.move_to_end(key)
            return Trace(run=run, **kept[key])
    trace = _read(run)
    if run.status == "running":
        return trace
    with _lock:
        # Without the run, which holds the store: what is kept of a store goes when the store goes.
        kept[key] = {field.name: getattr(trace, field.name) for field in fields(trace) if field.name != "run"}
        while len(kept) > _KEPT:
            kept.popitem(last=False)
    return trace


def _read(run: Run) -> Trace:
    found = [_decisions(run, *row) for row in run.sql(_ROUTERS).fetchall()]
    read = [entry for entry in found if entry is not None]
    if not read:
        raise InputError(
            f"run {run.name!r} has no decisions of routers",
            fix="record it with the probe routing on a model with experts",
        )
    tokens = {name: np.ma.filled(column, -1) for name, column in run.sql(_TOKENS).fetchnumpy().items()}
    kept = tokens["token"]
    for _, rows in read:
        kept = np.intersect1d(kept, rows, assume_unique=True)
    if not len(kept):
        raise InputError(f"run {run.name!r} has no token with a decision of every router", fix="look at run.coverage")
    picked = np.searchsorted(tokens["token"], kept)
    sequences = run.sql(_SEQUENCES).fetchnumpy()
    sequence_of = np.searchsorted(sequences["sequence_id"], tokens["sequence_id"][picked])
    present, inverse = np.unique(sequence_of, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    names = sequences["label"][present]
    label_names = tuple(sorted({str(name) for name in names if isinstance(name, str)}))
    label_of = {name: number for number, name in enumerate(label_names)}
    _, documents = np.unique(np.asarray(sequences["document_id"])[present], return_inverse=True)
    sequence = inverse[order].astype(np.int32)
    return Trace(
        run=run,
        routers=tuple(_picked(router, rows, kept, order) for router, rows in read),
        token=kept[order].astype(np.int64),
        sequence=sequence,
        position=tokens["position"][picked][order].astype(np.int32),
        token_id=tokens["token_id"][picked][order].astype(np.int32),
        predicted_id=tokens["predicted_id"][picked][order].astype(np.int32),
        decode=tokens["decode"][picked][order].astype(np.bool_),
        starts=np.searchsorted(sequence, np.arange(len(present) + 1)).astype(np.int64),
        sequence_ids=np.asarray(sequences["sequence_id"])[present].astype(np.int64),
        documents=documents.astype(np.int32),
        labels=np.array([label_of.get(name, -1) if isinstance(name, str) else -1 for name in names], np.int32),
        label_names=label_names,
        dropped=len(tokens["token"]) - len(kept),
    )


def _picked(router: Router, rows: Ints, kept: Ints, order: Ints) -> Router:
    if len(rows) == len(kept) and bool((order[1:] > order[:-1]).all()):
        return router
    chosen = router.experts[np.searchsorted(rows, kept)[order]]
    return Router(router.layer, router.block, router.n_experts, router.n_null, chosen)


def _decisions(run: Run, layer: int, block: str, n_experts: int, n_null: int, top_k: int) -> tuple[Router, Ints] | None:
    """A router's whole decisions in range, and the tokens they belong to, ascending; None where it has no rows."""
    found = run.sql(_DECISIONS, {"layer": layer, "block": block}).to_arrow_table()
    if not found.num_rows:
        return None
    token, listed = np.asarray(found.column(0)), found.column(1).combine_chunks()
    whole = np.asarray(listed.value_lengths().fill_null(0)) == top_k
    experts = np.asarray(listed.filter(pa.array(whole)).flatten(), dtype=np.uint16).reshape(-1, top_k)
    total = n_experts + n_null
    token = token[whole]
    real: NDArray[np.bool_] = np.asarray((experts < total).all(axis=1))
    real[1:] &= token[1:] != token[:-1]  # a decision written twice makes the run incomplete; it is still one decision
    if not real.all():
        experts = experts[real]
    return Router(layer, block, total, n_null, np.ascontiguousarray(experts)), token[real]
