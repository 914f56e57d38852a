"""The routers of a trace: how many experts, how many a token, and what is wrong with their decisions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import duckdb
import pyarrow as pa

from moescope.core.errors import InputError
from moescope.core.sites import EXPERT_INDICES, EXPERT_WEIGHTS, ROUTER_LOGITS, Site
from moescope.store.coverage import Expectation
from moescope.store.importing.checks import place
from moescope.store.importing.trace import Options, Trace

_FACTS = """
    SELECT
        layer, block,
        count(*) AS rows,
        mode(len(experts)) FILTER (list_min(experts) >= 0) AS top_k,
        max(list_max(experts)) AS last,
        count(weights) AS weighted,
        count(logits) AS with_logits,
        max(len(logits)) AS scores
    FROM moescope_trace
    GROUP BY layer, block
    ORDER BY layer, block
"""
_RECORDED = "list_min(experts) >= 0"
_USED = """list_unique(list_filter(experts, lambda e, i: weights[i] <> 0))
    < len(list_filter(weights, lambda w: w <> 0))"""
# Up to so many experts a token the ids are compared pair by pair, which is many times as quick as counting them.
_COMPARED = 12
_WRONG = {
    f"NOT ({_RECORDED})": "{n} rows have ids below 0: they were not recorded",
    "list_max(experts) >= n_experts + n_null": "{n} rows have ids outside of 0 to {last}",
    f"{_RECORDED} AND len(experts) <> top_k": "{n} rows have not {k} experts",
    f"{_RECORDED} AND {{twice}}": "{n} rows name the same expert twice",
    "NOT isfinite(list_sum(weights))": "{n} rows have weights that are NaN or infinite",
}
_DECISIONS = "SELECT sum(len({what})) FROM routing WHERE run_id = $run AND layer = $layer AND block = $block"
_SCORES = "SELECT count(*) FROM router_logits WHERE run_id = $run AND layer = $layer AND block = $block"


@dataclass
class Router:
    """One router of a trace.

    Attributes:
        layer, block: where it is.
        n_experts, n_null, top_k: what it chooses from, and how many.
        weighted, with_logits: rows that have weights, logits.
        problems: what is wrong with its decisions, one sentence each.
        row: what else the trace says for the store's table `layers`.
    """

    layer: int
    block: str
    n_experts: int
    n_null: int
    top_k: int
    weighted: int
    with_logits: int
    problems: list[str] = field(default_factory=list)
    row: dict[str, Any] = field(default_factory=dict)

    def expectations(self, tokens: int) -> list[Expectation]:
        """k experts a token, and as many weights and all scores where the trace has any."""
        problem = "; ".join(self.problems) or None
        expected = {EXPERT_INDICES: (tokens * self.top_k, _DECISIONS.format(what="experts"), problem)}
        if self.weighted:
            expected[EXPERT_WEIGHTS] = (tokens * self.top_k, _DECISIONS.format(what="weights"), None)
        if self.with_logits:
            expected[ROUTER_LOGITS] = (tokens, _SCORES, None)
        return [
            Expectation(str(Site(self.layer, self.block, tensor)), count, query, self.layer, self.block, said)
            for tensor, (count, query, said) in expected.items()
        ]


def find_routers(connection: duckdb.DuckDBPyConnection, trace: Trace, options: Options, called: object) -> list[Router]:
    """Every router of `moescope_trace`, its decisions looked through.

    Raises:
        InputError: nobody says how many experts there are.
    """
    known = {(row["layer"], row["block"]): row for row in trace.layers.to_pylist()} if trace.layers is not None else {}
    routers = []
    for layer, block, _, mode, last, weighted, with_logits, scores in connection.execute(_FACTS).fetchall():
        row = known.get((layer, block), {})
        n_experts = options.n_experts or row.get("n_experts") or trace.n_experts or scores
        if not n_experts:
            raise InputError(
                f"{called} does not say how many experts a layer has",
                found=f"the largest id of layer {layer} is {last}",
                fix="pass n_experts=… (--n-experts), as the model's config has it",
            )
        router = Router(
            layer=layer,
            block=block,
            n_experts=n_experts,
            n_null=_first(options.n_null, row.get("n_null"), trace.n_null, 0),
            top_k=options.top_k or row.get("top_k") or trace.top_k or mode or 1,
            weighted=weighted,
            with_logits=with_logits,
            row={key: row.get(key) for key in ("stack", "kind", "n_shared", "d_expert", "routing_rule")},
        )
        routers.append(router)
    _look_through(connection, routers)
    return routers


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)


def _look_through(connection: duckdb.DuckDBPyConnection, routers: Sequence[Router]) -> None:
    """Note what is wrong with each router's decisions: all of them in one pass, places only where something is."""
    columns = [[getattr(r, name) for r in routers] for name in ("layer", "block", "top_k", "n_experts", "n_null")]
    connection.register("moescope_routers", pa.table(columns, ["layer", "block", "top_k", "n_experts", "n_null"]))
    twice = _twice(max(r.top_k for r in routers))
    wrong = {condition.replace("{twice}", twice): says for condition, says in _WRONG.items()}
    counts = ", ".join(f"count(*) FILTER ({condition})" for condition in wrong)
    found = connection.execute(
        f"SELECT layer, block, {counts} FROM moescope_trace JOIN moescope_routers USING (layer, block) GROUP BY ALL"
    ).fetchall()
    by_place = {(layer, block): rows for layer, block, *rows in found}
    for router in routers:
        at = {"layer": router.layer, "block": router.block}
        for (condition, says), rows in zip(wrong.items(), by_place[router.layer, router.block], strict=True):
            if rows:
                said = says.format(n=f"{rows:,}", last=router.n_experts + router.n_null - 1, k=router.top_k)
                router.problems.append(f"{said} ({place(connection, condition, at)})")


def _twice(top_k: int) -> str:
    """SQL that says whether a row names an expert twice, other than in slots of weight 0."""
    compared = min(top_k, _COMPARED)
    pairs = [f"experts[{i}] = experts[{j}]" for i in range(1, compared + 1) for j in range(i + 1, compared + 1)]
    counted = f"CASE WHEN len(experts) > {compared} THEN list_unique(experts) < len(experts) ELSE {' OR '.join(pairs) or 'FALSE'} END"
    return f"CASE WHEN {counted} THEN weights IS NULL OR {_USED} ELSE FALSE END"
