"""Whether a text is one query that only reads: decided by DuckDB's own parser, before anything runs."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import duckdb

from moescope.core.errors import InputError

LONGEST = 100_000
_PARAMETER = re.compile(r"[a-z][a-z0-9_]{0,29}", re.ASCII)
# Everything that a query may be made of; inserting, deleting, updating and copying inside WITH are nodes of other names.
_NODES = frozenset({"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"})
# Functions that stand where a table does. Others read files, change settings or write the file anew.
_TABLES = frozenset(
    {
        "range", "generate_series", "unnest", "json_each", "json_tree", "histogram", "histogram_values", "summary",
        "duckdb_tables", "duckdb_columns", "duckdb_views", "duckdb_schemas", "duckdb_types", "duckdb_functions", "duckdb_keywords",
        "duckdb_constraints", "duckdb_indexes", "duckdb_settings", "duckdb_memory", "duckdb_databases", "duckdb_extensions",
        "pragma_table_info", "table_info", "pragma_storage_info", "storage_info", "pragma_database_size", "database_size",
        "pragma_version", "version", "pragma_show", "show", "show_tables",
    }
)  # fmt: skip
# Functions of values that look beyond the store, or leave something behind.
_REFUSED = frozenset({"getenv", "write_log", "nextval", "setval", "currval", "sleep_ms"})
_QUOTED_OR_END = re.compile(
    r"""[eE]'(?:[^'\\]|\\.|'')*' | '(?:[^']|'')*' | "(?:[^"]|"")*" | \$(\w*)\$.*?\$\1\$ | --[^\n]* | /\*.*?\*/ | ;""",
    re.DOTALL | re.VERBOSE,
)
_LOCK = threading.Lock()
_PARSER: list[duckdb.DuckDBPyConnection] = []


@dataclass(frozen=True)
class OneSelect:
    """A query that only reads.

    Attributes:
        text: as it was written, without what ends it.
        parameters: the names after `$`, in alphabetical order.
    """

    text: str
    parameters: tuple[str, ...] = ()


def one_select(text: str) -> OneSelect:
    """The query in a text.

    Raises:
        InputError: no query, several, one that is not a SELECT, one that writes inside, reads files, calls a function that
            looks beyond the store, or does not parse.

    Example:
        >>> one_select("SELECT * FROM tokens WHERE run_id = $run;").parameters
        ('run',)
    """
    if len(text) > LONGEST:
        raise InputError("the query is too long", expected=f"at most {LONGEST:,} characters", found=f"{len(text):,}")
    if "\0" in text:
        raise InputError("the query has a NUL character in it", fix="remove it")
    if not written_in_full(text):
        raise InputError("the query has half a character in it", fix="write it anew")
    statement = _only(_statements(text))
    tree = _tree(text)
    for node in _dicts(tree):
        _check(node)
    names = tuple(sorted(str(name) for name in statement.named_parameters))
    for name in names:
        if not _PARAMETER.fullmatch(name):
            raise InputError(
                f"a parameter cannot be called {name[:40]!r}",
                expected="$ and a word in small letters, for instance $layer",
                fix="give it a name",
            )
    return OneSelect(_unended(text, tree), names)


def written_in_full(text: str) -> bool:
    """Whether a text is one that can be handed on; half of a pair of surrogates is none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unended(text: str, tree: Any) -> str:
    """The query without the semicolons that end it, so that it can stand inside another; places in it stay the same."""
    shorter = _QUOTED_OR_END.sub(lambda found: " " if found[0] == ";" else found[0], text)
    try:
        same = shorter == text or bool(_tree(shorter) == tree)
    except RecursionError:
        raise _too_deep() from None
    return shorter if same else text


def _statements(text: str) -> list[duckdb.Statement]:
    try:
        return _parser().extract_statements(text)
    except duckdb.Error as refused:
        raise InputError("the query cannot be read", found=str(refused)) from refused


def _kind(statement: duckdb.Statement) -> str:
    try:
        return str(statement.type.name)
    except ValueError:  # a kind that DuckDB's Python does not know by name
        return "of another kind"


def _only(statements: list[duckdb.Statement]) -> duckdb.Statement:
    if not statements:
        raise InputError("there is no query", fix="write one, or choose an example")
    for statement in statements:
        if (kind := _kind(statement)) != "SELECT":
            raise _not_a_select(kind)
    if len(statements) > 1:
        raise InputError(
            "one query at a time", found=f"{len(statements)} statements", fix="run them one after the other"
        )
    return statements[0]


def _not_a_select(kind: str) -> InputError:
    fix = "give PIVOT its values: PIVOT … ON … IN (…)" if kind == "MULTI" else "write it as a SELECT"
    return InputError("this page only reads", expected="one SELECT", found=f"a statement {kind}", fix=fix)


def _tree(text: str) -> Any:
    """The query as its parser sees it."""
    cursor = _parser()
    (found,) = cursor.execute("SELECT json_serialize_sql($text::VARCHAR)", {"text": text}).fetchall()[0]
    try:
        tree = json.loads(found)
    except RecursionError:
        raise _too_deep() from None
    if tree.get("error"):
        raise InputError("the query cannot be read", found=str(tree.get("error_message")))
    return tree


def _too_deep() -> InputError:
    return InputError("the query is nested too deeply", fix="split it with WITH")


def _check(node: dict[str, Any]) -> None:
    kind = node.get("type")
    if isinstance(kind, str) and kind.endswith("_NODE") and kind not in _NODES:
        word = kind.removesuffix("_NODE").removesuffix("_QUERY")
        raise InputError("this page only reads", expected="one SELECT", found=f"{word} inside it")
    if kind == "TABLE_FUNCTION":
        name = str((node.get("function") or {}).get("function_name", "")).lower()
        if name not in _TABLES:
            raise InputError(
                f"the function {name or '?'} is not for this page",
                expected="tables and views of the store",
                found="a function that reads files or settings, or changes something"
                if name
                else "a function without a name",
                fix="use the Python side: Store(path).sql(…)",
            )
    if str(node.get("function_name", "")).lower() in _REFUSED:
        raise InputError(f"the function {node['function_name']} is not for this page")


def _dicts(tree: Any) -> Iterator[dict[str, Any]]:
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            yield node
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node


def _parser() -> duckdb.DuckDBPyConnection:
    """A connection to nothing, which cannot reach anything."""
    with _LOCK:
        if not _PARSER:
            locks = {"enable_external_access": "false", "python_enable_replacements": "false", "threads": "1"}
            _PARSER.append(duckdb.connect(":memory:", config={**locks, "lock_configuration": "true"}))
        return _PARSER[0].cursor()
