"""A result as text to copy: the query behind it with its values in place, and the Python that gives it again."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moescope.core.analysis import analyses
from moescope.core.result import Result

_QUOTED_OR_PARAMETER = re.compile(r"'(?:[^']|'')*'|--[^\n]*|\$(?P<name>[A-Za-z_]\w*)")


def query_with_values(sql: str, parameters: Mapping[str, Any]) -> str:
    """A query with its parameters written in as SQL literals, for a reader to run elsewhere.

    The analyses themselves bind their parameters; this is a text to show.

    Example:
        >>> query_with_values("SELECT * FROM runs WHERE name = $name", {"name": "it's"})
        "SELECT * FROM runs WHERE name = 'it''s'"
    """

    def value(match: re.Match[str]) -> str:
        name = match["name"]
        return literal(parameters[name]) if name is not None and name in parameters else match[0]

    return _QUOTED_OR_PARAMETER.sub(value, sql)


def literal(value: Any) -> str:
    """A value as DuckDB reads it.

    Example:
        >>> literal([1, None, True, 0.5])
        '[1, NULL, true, 0.5]'
    """
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        plain = repr(value)
        return plain if plain[-1].isdigit() else f"'{plain}'::DOUBLE"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(literal(part) for part in value) + "]"
    return "'" + str(value).replace("'", "''") + "'"


def python_of(result: Result, path: Path) -> str:
    """A runnable text that computes the result again; only parameters that differ from their defaults are named.

    Args:
        result: as the registry gave it.
        path: the store's file.
    """
    names = [str(part["run"]) for part in result.provenance.get("runs", [result.provenance])]
    runs = [f"store.run({name!r})" for name in names]
    known = analyses[result.name].parameters
    given = {name: value for name, value in result.parameters.items() if value != known[name].default}
    if result.incomplete:
        given["allow_incomplete"] = True
    arguments = [runs[0] if len(runs) == 1 else f"[{', '.join(runs)}]", repr(result.name)]
    arguments += [f"{name}={value!r}" for name, value in given.items()]
    call = f"    result = ms.analyze({', '.join(arguments)})"
    if len(call) > _LINE:
        call = "\n        ".join(["    result = ms.analyze(", *[f"{part}," for part in arguments]]) + "\n    )"
    last = "result.figure()" if result.has_figure else "result.df()"
    return f"import moescope as ms\n\nwith ms.Store({str(path)!r}, read_only=True) as store:\n{call}\n{last}\n"


_LINE = 100
