"""Reader of llama.cpp expert traces: the CSV files of the `moe-trace` tools, told apart by their columns.

| columns | one row is | written by |
|---|---|---|
| `turn,phase,step,layer,slot,expert,weight,…` after a `# route_trace v1` | a chosen expert | BigMoeOnEdge `--route-trace` |
| `phase,token,layer,rank,expert` | a chosen expert | moe-trace with phases |
| no header: `position,layer,id,id,…`, prompt positions negative | a token and layer | moe-trace of the expert-cache forks |
| `layer,expert`, with a header or without | a chosen expert, of no known token | moe-trace of ggml-org/llama.cpp#28544 |
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import duckdb

from moescope.core.errors import InputError
from moescope.store.importing.files import glob_free, reading
from moescope.store.importing.trace import Options, Trace

_NO_WEIGHTS = "the trace has expert ids without weights; slots keep the order of the file"
_LAST_LAYER = "llama.cpp computes the last layer of a prompt for its last token only, so that layer has fewer decisions than the others"
_ROUTE_TRACE = """
    SELECT
        turn AS sequence_id,
        step AS position,
        layer,
        list(expert ORDER BY slot) AS experts,
        CASE WHEN bool_and(isfinite(weight)) THEN list(weight ORDER BY slot) END AS weights,
        CASE WHEN min(phase) = 1 THEN 'decode' ELSE 'prefill' END AS phase
    FROM lines
    GROUP BY turn, phase, step, layer
"""
_RANKED = """
    SELECT
        0 AS sequence_id,
        token AS position,
        layer,
        list(expert ORDER BY rank) AS experts,
        min(CASE WHEN lower(CAST(phase AS VARCHAR)) IN ('decode', '1') THEN 'decode' ELSE 'prefill' END) AS phase
    FROM lines
    GROUP BY phase, token, layer
"""
# Prompt tokens carry negative positions that start again with every part of the prompt; rows of one layer are in order.
_WIDE = """
    WITH counted AS (
        SELECT *, row_number() OVER (PARTITION BY layer, position < 0 ORDER BY line) - 1 AS place
        FROM lines
    ),
    lengths AS (
        SELECT layer, count(*) AS length, max(count(*)) OVER () AS prompt
        FROM counted
        WHERE position < 0
        GROUP BY layer
    )
    SELECT
        0 AS sequence_id,
        CASE
            WHEN position >= 0 THEN position + coalesce((SELECT max(prompt) FROM lengths), 0)
            WHEN length = 1 THEN prompt - 1
            ELSE place
        END AS position,
        layer,
        experts,
        CASE WHEN position < 0 THEN 'prefill' ELSE 'decode' END AS phase
    FROM counted
    LEFT JOIN lengths USING (layer)
    WHERE position >= 0 OR length IN (1, prompt)
"""
_CUT = """
    SELECT coalesce(sum(length), 0)
    FROM (
        SELECT count(*) AS length, max(count(*)) OVER () AS prompt
        FROM lines
        WHERE position < 0
        GROUP BY layer
    )
    WHERE length NOT IN (1, prompt)
"""
_COUNTS = "SELECT layer, expert, count(*) AS tokens FROM lines GROUP BY layer, expert ORDER BY layer, expert"


@dataclass
class _Head:
    """What the first lines of a file say."""

    comments: int = 0
    columns: list[str] = field(default_factory=list)
    named: bool = False
    facts: dict[str, str] = field(default_factory=dict)


def read_llama_cpp(source: Path, connection: duckdb.DuckDBPyConnection, options: Options) -> Trace:
    """An expert trace of llama.cpp.

    Args:
        source: the CSV file.
        connection: reads the file.
        options: unused.

    Raises:
        InputError: the columns are of no known layout.
    """
    with reading(source):
        head = _head(source)
        trace = Trace("llama.cpp", model=head.facts.get("model"))
        trace.n_experts, trace.top_k = (_number(head.facts.get(key)) for key in ("n_expert", "n_expert_used"))
        lines = connection.read_csv(
            glob_free(source),
            header=head.named,
            skiprows=head.comments,
            delimiter=",",
            columns=dict.fromkeys(head.columns, "BIGINT") | _other_types(head.columns),
        )
        connection.register("lines", lines)
        known = set(head.columns)
        if {"turn", "phase", "step", "layer", "slot", "expert", "weight"} <= known:
            trace.decisions = _ordered(connection, _ROUTE_TRACE)
            trace.notes.append(_LAST_LAYER)
        elif {"phase", "token", "layer", "rank", "expert"} <= known:
            trace.decisions = _ordered(connection, _RANKED)
            trace.notes += [_NO_WEIGHTS, _LAST_LAYER]
        elif known == {"layer", "expert"}:
            trace.counts = connection.sql(_COUNTS).to_arrow_table()
        else:
            _read_wide(connection, head, trace, source)
    return trace


def _ordered(connection: duckdb.DuckDBPyConnection, query: str) -> duckdb.DuckDBPyRelation:
    return connection.sql(f"{query} ORDER BY sequence_id, position, layer")


def _read_wide(connection: duckdb.DuckDBPyConnection, head: _Head, trace: Trace, source: Path) -> None:
    if head.named or len(head.columns) < 3:
        raise InputError(
            f"{source} is no expert trace that is known",
            expected="turn,phase,step,layer,slot,expert,weight; phase,token,layer,rank,expert; layer,expert; or lines of "
            "position,layer,id,id,… without a header",
            found="the columns " + ", ".join(head.columns[:10]),
            fix="rename its columns as docs/import-export.md says, and import it as neutral",
        )
    ids = ", ".join(head.columns[2:])
    rows = connection.table("lines").query(
        "wide", f"SELECT position, layer, [{ids}] AS experts, row_number() OVER () AS line FROM wide"
    )
    connection.register("kept_lines", rows)
    connection.execute("CREATE TEMP TABLE moescope_lines AS SELECT * FROM kept_lines")
    connection.register("lines", connection.table("moescope_lines"))
    if cut := connection.execute(_CUT).fetchall()[0][0]:
        trace.notes.append(
            f"{cut:,} rows of the prompt were left out: their layer has some of its tokens, not known which"
        )
    trace.decisions = _ordered(connection, _WIDE)
    trace.notes += [_NO_WEIGHTS, _LAST_LAYER]


def _head(source: Path) -> _Head:
    """Comments with their `key=value` facts, then the names of the columns, given or made up."""
    head = _Head()
    with source.open(encoding="utf-8-sig") as file:
        for line in file:
            if not line.startswith("#"):
                break
            head.comments += 1
            if "n_expert=" in line:
                head.facts = dict(re.findall(r"(\w+)=(.*?)(?=\s+\w+=|\s*$)", line.strip()))
        else:
            line = ""
    cells = [cell.strip().strip('"') for cell in line.strip().split(",")]
    head.named = not all(re.fullmatch(r"-?\d+", cell) for cell in cells)
    if head.named:
        head.columns = [cell.lower() for cell in cells]
    elif len(cells) == 2:
        head.columns = ["layer", "expert"]
    else:
        head.columns = ["position", "layer", *(f"id{n}" for n in range(len(cells) - 2))]
    if len(set(head.columns)) < len(head.columns) or not all(re.fullmatch(r"\w+", name) for name in head.columns):
        raise InputError(f"{source} is no expert trace", found=f"the first line is {line.strip()[:80]!r}")
    return head


def _other_types(columns: list[str]) -> dict[str, str]:
    found = {"weight": "DOUBLE"} if "weight" in columns else {}
    known = {"turn", "phase", "step", "token", "layer", "slot", "rank", "expert", "position", "weight"}
    others = [name for name in columns if name not in known and not re.fullmatch(r"id\d+", name)]
    if "token" in columns:
        others.append("phase")  # there it is a word
    return found | dict.fromkeys(others, "VARCHAR")


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None
