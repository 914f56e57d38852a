"""What a trace may not be: rows that contradict each other or that no run can hold, refused with their place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import duckdb

from moescope.core.errors import InputError

_LAST_ID = 65_535
_LAST_POSITION = 2**31 - 1


@dataclass(frozen=True)
class _Rule:
    wrong: str
    says: str
    expected: str | None = None
    fix: str | None = None


_ROWS = (
    _Rule(
        "sequence_id IS NULL OR position IS NULL OR layer IS NULL OR experts IS NULL",
        "{n} rows have no sequence_id, position, layer or experts",
    ),
    _Rule("sequence_id < 0 OR position < 0 OR layer < 0", "{n} rows have a negative sequence_id, position or layer"),
    _Rule(f"layer > {_LAST_ID} OR position > {_LAST_POSITION}", "{n} rows have a layer or position that is too large"),
    _Rule("len(experts) = 0", "{n} rows name no expert", fix="leave out rows of tokens that were not routed"),
    _Rule("list_count(experts) <> len(experts)", "{n} rows have an expert without an id"),
    _Rule(f"list_max(experts) > {_LAST_ID}", "{n} rows have an expert id over 65,535"),
    _Rule(
        "len(weights) <> len(experts)",
        "{n} rows have not as many weights as experts",
        expected="a weight for each expert, or null for all",
    ),
    _Rule(
        "list_count(weights) <> len(weights)", "{n} rows have a weight that is null", expected="null for all, or none"
    ),
    _Rule("phase NOT IN ('prefill', 'decode')", "{n} rows have an unknown phase", expected="prefill or decode"),
    _Rule(
        "NOT regexp_full_match(block, '(mlp|attn)(\\.\\d+)?')",
        "{n} rows have an unknown block",
        expected="mlp, attn, mlp.1, …",
    ),
    _Rule("token_id < 0", "{n} rows have a negative token_id", expected="null where the token is not known"),
)
# What every row of a token must agree on.
_OF_A_TOKEN = ("phase", "token_id", "text")
_OF_A_SEQUENCE = ("label", "document_id")


def check_rows(connection: duckdb.DuckDBPyConnection, called: object) -> int:
    """Refuse a trace whose rows cannot all be true; gives the number of its rows.

    Raises:
        InputError: naming the first row, counted from 0.
    """
    counts = ", ".join(f"count(*) FILTER ({rule.wrong})" for rule in _ROWS)
    rows, *found = connection.execute(f"SELECT count(*), {counts} FROM moescope_trace").fetchall()[0]
    if not rows:
        raise InputError(f"{called} holds no decisions")
    for rule, count in zip(_ROWS, found, strict=True):
        if count:
            raise InputError(
                f"{called}: {rule.says.format(n=f'{count:,}')}",
                expected=rule.expected,
                found=place(connection, rule.wrong),
                fix=rule.fix,
            )
    _check_twice(connection, called)
    return int(rows)


def _check_twice(connection: duckdb.DuckDBPyConnection, called: object) -> None:
    twice = connection.execute(
        """
        SELECT sequence_id, position, layer, block
        FROM moescope_trace
        GROUP BY ALL
        HAVING count(*) > 1
        ORDER BY ALL
        LIMIT 1
        """
    ).fetchall()
    if not twice:
        return
    sequence, position, layer, block = twice[0]
    where = connection.execute(
        """
        SELECT row
        FROM moescope_trace
        WHERE sequence_id = ? AND position = ? AND layer = ? AND block = ?
        ORDER BY file, row
        """,
        twice[0],
    ).fetchall()
    raise InputError(
        f"{called} has two decisions for one token and router",
        found=f"sequence {sequence}, position {position}, layer {layer}, block {block} in rows "
        + " and ".join(f"{row:,}" for (row,) in where[:3])
        + " (counted from 0)",
        fix="give each sequence a sequence_id of its own, and keep one row for each token and router",
    )


def check_tokens(connection: duckdb.DuckDBPyConnection, called: object) -> None:
    """Refuse a trace whose rows of one token or one sequence disagree on what they say of it."""
    for keys, names in ((("sequence_id", "position"), _OF_A_TOKEN), (("sequence_id",), _OF_A_SEQUENCE)):
        for name in names:
            differing = " AND ".join(f"{key} = ?" for key in keys)
            query = f"""
                SELECT {", ".join(keys)}, min("{name}") AS one, max("{name}") AS other
                FROM moescope_trace
                WHERE "{name}" IS NOT NULL
                GROUP BY {", ".join(keys)}
                HAVING one <> other
                ORDER BY {", ".join(keys)}
                LIMIT 1
            """
            for *at, one, other in connection.execute(query).fetchall():
                said = ", ".join(f"{key} {value}" for key, value in zip(keys, at, strict=True))
                row = connection.execute(
                    f'SELECT min(row) FROM moescope_trace WHERE {differing} AND "{name}" = ?', [*at, other]
                ).fetchall()[0][0]
                raise InputError(
                    f"{called} gives one {'token' if len(keys) > 1 else 'sequence'} two values of {name}",
                    found=f"{said}: {one!r} and {other!r} (row {row:,}, counted from 0)",
                )


def place(connection: duckdb.DuckDBPyConnection, wrong: str, router: dict[str, Any] | None = None) -> str:
    """Where the first row is of which a condition holds: `the first is row 17 (counted from 0)`.

    Args:
        connection: holds `moescope_trace`.
        wrong: the condition.
        router: its layer and block, where only its rows count; the condition may then name columns of `moescope_routers`.
    """
    of_router = "JOIN moescope_routers USING (layer, block)" if router else ""
    and_there = "AND layer = $layer AND block = $block" if router else ""
    row, file = connection.execute(
        f"SELECT row, file FROM moescope_trace {of_router} WHERE {wrong} {and_there} ORDER BY file, row LIMIT 1",
        router or {},
    ).fetchall()[0]
    return f"the first is row {row:,} (counted from 0)" + (f" of {file}" if file else "")
