"""Stored router logits, chunk by chunk beside the decisions, and the rule that turns them into scores."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.routing.trace import Router, Trace

Floats32 = NDArray[np.float32]

# Tokens read at once: 32 MB of logits for 128 experts.
CHUNK = 65_536

_LOGITS = """
    SELECT token, logits
    FROM router_logits
    WHERE run_id = $run AND layer = $layer AND block = $block AND token BETWEEN $first AND $last AND token % $step = 0
    ORDER BY token
"""
_RULE = """
    SELECT routing_rule
    FROM layers
    WHERE run_id = $run AND layer = $layer AND block = $block
"""
_ANY = """
    SELECT layer, block
    FROM router_logits
    WHERE run_id = $run
    GROUP BY layer, block
"""


@dataclass(frozen=True)
class Scoring:
    """How a router's logits become scores, and scores a decision; read from `layers.routing_rule`.

    Attributes:
        score: `softmax`, `sigmoid`, `sqrtsoftplus` or `sparsemixer`.
        choice: whether the top-k is taken of scores or logits, or experts come from a table of ids (`hash`).
        biased: whether a vector is added for the choice; stores do not hold it.
        groups: limit on groups of experts (number, kept, by, others); empty for none.
        stored: whether the run names a rule; a plain softmax is assumed where it does not.
    """

    score: str = "softmax"
    choice: str = "score"
    biased: bool = False
    groups: Mapping[str, Any] = field(default_factory=dict)
    stored: bool = False

    def scores(self, logits: Floats32) -> Floats32:
        """[token, expert] scores before any bias."""
        if self.score == "sigmoid":
            return _sigmoid(logits)
        if self.score == "sqrtsoftplus":
            return np.sqrt(np.logaddexp(np.float32(0), logits))
        found: Floats32 = np.exp(logits - logits.max(1, keepdims=True))
        found /= found.sum(1, keepdims=True)
        return found

    def probabilities(self, logits: Floats32) -> Floats32:
        """[token, expert] scores over their sum."""
        found = self.scores(logits)
        if self.score not in ("softmax", "sparsemixer"):
            found = found / found.sum(1, keepdims=True)
        return found

    def selection(self, logits: Floats32) -> Floats32:
        """What the top-k is taken of, but for a bias; minus infinity for experts that may not be chosen."""
        found = self.scores(logits) if self.groups else logits
        if not self.groups:
            return found
        number, kept = int(self.groups["number"]), int(self.groups["kept"])
        parts = found.reshape(len(found), number, -1)
        ordered = np.sort(parts, axis=2)
        worth = ordered[:, :, -2:].sum(2) if self.groups.get("by", "top2") == "top2" else ordered[:, :, -1]
        allowed = np.zeros(worth.shape, bool)
        np.put_along_axis(allowed, np.argsort(-worth, axis=1, kind="stable")[:, :kept], True, axis=1)
        others = -np.inf if self.groups.get("others", "-inf") == "-inf" else 0.0
        return np.where(allowed[:, :, None], parts, np.float32(others)).reshape(found.shape)

    def reproduces(self, logits: Floats32, experts: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
        """[token] Whether the top-k is the decision; ties may go either way."""
        found = self.selection(logits).copy()
        chosen = np.take_along_axis(found, experts.astype(np.intp), 1).min(1)
        np.put_along_axis(found, experts.astype(np.intp), -np.inf, 1)
        # Scores computed in the model's own, narrower type may tie where these do not.
        slack = 0.0 if not self.groups else 2**-8 * np.abs(chosen)
        agrees: NDArray[np.bool_] = chosen + slack >= found.max(1)
        return agrees


def scoring(trace: Trace, router: Router) -> Scoring:
    """The stored rule of a router; plain softmax where none is stored."""
    found = trace.run.sql(_RULE, {"layer": router.layer, "block": router.block}).fetchall()
    rule = json.loads(found[0][0]) if found and found[0][0] else {}
    return Scoring(
        score=rule.get("score", "softmax"),
        choice=rule.get("choice", "score"),
        biased=rule.get("bias") is not None,
        groups=rule.get("groups") or {},
        stored=bool(rule),
    )


def scored_routers(trace: Trace) -> tuple[Router, ...]:
    """The routers whose logits are stored.

    Raises:
        InputError: there is none.
    """
    known = set(trace.run.sql(_ANY).fetchall())
    routers = tuple(router for router in trace.routers if (router.layer, router.block) in known)
    if not routers:
        raise InputError(
            f"run {trace.run.name!r} has no router logits",
            found="decisions, without the scores behind them",
            fix="record it from a live model with --probe router_logits",
        )
    return routers


def logit_chunks(
    trace: Trace, router: Router, *, chunk: int = CHUNK, starts: Sequence[int] | None = None
) -> Iterator[tuple[NDArray[np.int64], Floats32]]:
    """Rows of the trace and their logits [row, expert], in order; tokens without whole, sound logits are left out.

    Args:
        trace: the decisions.
        router: whose logits.
        chunk: tokens read at once.
        starts: first rows of the chunks wanted; all, where not given.
    """
    for start in range(0, trace.tokens, chunk) if starts is None else starts:
        rows, logits = _read(trace, router, np.arange(start, min(start + chunk, trace.tokens)), step=1)
        if len(rows):
            yield rows, logits


def logit_sample(trace: Trace, router: Router, *, step: int) -> tuple[NDArray[np.int64], Floats32]:
    """Rows of every `step`-th token of the run, and their logits [row, expert]."""
    return _read(trace, router, np.flatnonzero(trace.token % step == 0), step=step)


def _read(trace: Trace, router: Router, wanted: NDArray[np.int64], *, step: int) -> tuple[NDArray[np.int64], Floats32]:
    nothing = np.zeros((0, router.n_experts), np.float32)
    if not len(wanted):
        return wanted, nothing
    token = trace.token[wanted]
    bounds = {"first": int(token.min()), "last": int(token.max()), "step": step}
    found = trace.run.sql(_LOGITS, {"layer": router.layer, "block": router.block, **bounds}).to_arrow_table()
    listed = found.column(1).combine_chunks()
    whole = np.asarray(listed.value_lengths().fill_null(0)) == router.n_experts
    known = np.asarray(found.column(0))[whole]
    if not len(known):
        return wanted[:0], nothing
    flat = (listed if whole.all() else listed.filter(pa.array(whole))).flatten()
    logits = np.asarray(flat.to_numpy(zero_copy_only=False), np.float32).reshape(-1, router.n_experts)
    if not np.array_equal(known, token):
        place = np.minimum(np.searchsorted(known, token), len(known) - 1)
        has = known[place] == token
        wanted, logits = wanted[has], logits[place[has]]
    highest = logits.max(1)
    sound = np.isfinite(highest)  # max hands a NaN on
    return (wanted, logits) if sound.all() else (wanted[sound], logits[sound])


def _sigmoid(logits: Floats32) -> Floats32:
    found: Floats32 = np.float32(0.5) * (np.float32(1) + np.tanh(np.float32(0.5) * logits))
    return found
