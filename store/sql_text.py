"""Text inside SQL where DuckDB takes no bound parameter: comments, paths of attached files, names of tables."""

from __future__ import annotations


def literal(text: str) -> str:
    """`text` as an SQL string.

    Example:
        >>> literal("the user's own")
        "'the user''s own'"
    """
    return "'" + text.replace("'", "''") + "'"


def quoted_name(name: str) -> str:
    """`name` of a table or column, whatever it is made of.

    Example:
        >>> quoted_name('my "best" table')
        '"my ""best"" table"'
    """
    return '"' + name.replace('"', '""') + '"'
