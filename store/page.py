"""The page of tables and columns in the documentation, written from the schema: `python -m moescope.store.page`."""

from __future__ import annotations

import sys

from moescope.store.schema import SCHEMA_VERSION, TABLES, Table
from moescope.store.views import VIEWS, View

_HEAD = """# The store

A store is one DuckDB file. Any DuckDB client reads it: the `duckdb` shell, DBeaver, R, Polars, `moescope`. Every table and
column carries a comment that says what it means; this page is written from the same data
(`python -m moescope.store.page > docs/store.md`).

```sql
SELECT table_name, comment FROM duckdb_tables() ORDER BY table_name;
SELECT column_name, data_type, comment FROM duckdb_columns() WHERE table_name = 'routing';
```

A store holds any number of runs; almost every table has a `run_id`. A `token` is a run-wide number of an unmasked token, and
`block` is part of the key wherever a router or an expert is meant. Lists of a decision (`experts`, `weights`, `norms`) share
one order: by weight, descending.

```sql
-- the decisions of one run, with the text of each token
SELECT t.text, d.layer, d.slot, d.expert, d.weight
FROM decisions d
JOIN token_text t USING (run_id, token)
JOIN runs r USING (run_id)
WHERE r.name = 'base' AND d.layer = 3
LIMIT 20;
```

```sql
-- which experts take most of a layer's work
SELECT layer, expert, share, relative_load
FROM expert_load
JOIN runs r USING (run_id)
WHERE r.name = 'base'
ORDER BY relative_load DESC
LIMIT 10;
```

```sql
-- what is not fully recorded, in any run
SELECT name, site, missing, detail FROM gaps;
```

## One writer, or many readers
One process at a time may hold a store for writing; then no other can open it, and is told the program and process id that
does. A store that nobody writes may be read by any number of processes: `Store(path, read_only=True)`. A store opened for
reading is closed in on itself: its queries reach no file and no network address outside it, and its settings are locked, so
that a store from a stranger can be looked at. Folders that queries may read and write all the same are named:
`Store(path, read_only=True, folders=["exports"])`.

A store on a read-only folder can be read. A damaged store is refused, or the query that meets the damage is: DuckDB keeps a
checksum of every block. Where the disk fills, what was committed stays whole: free some space and open the store again; the
run that was being recorded is `incomplete`, and `profile --resume` goes on with it.

## Versions
The file says which version of this schema it has (`store_info`); the present one is {version}. A store of an older version is
upgraded when it is next opened for writing, or by `moescope runs upgrade`: a copy of the file as it was is kept beside it
(`runs.duckdb.v1`, …), and the upgrade is one transaction, so that the store is whole in its old or its new form whatever
stops it. Opening an older store for reading does not change it: it is refused, with the command that upgrades it. A newer
store is refused with the version of moescope that it needs.

## Deleting, and room
`moescope runs delete NAME` takes away every row of a run, in one transaction, and its vectors beside the file
(`runs.vectors/<run_id>`). The file keeps its size, and the next run uses the room. `moescope runs compact` writes the file
anew without it and puts the new one in place in one step; while it works it needs as much free disk as the store has content.
Tables and views of your own in the file are kept by upgrades and by compacting.
"""


def as_markdown() -> str:
    """The whole page."""
    parts = [_HEAD.format(version=SCHEMA_VERSION), "\n## Tables\n"]
    parts += [_section(table) for table in TABLES]
    parts += [
        "\n## Views\n\nA view is a stored query: it takes no room. None sorts, and conditions on `run_id`, `layer` or `token` "
        "are applied before\nanything is unrolled or joined. Counting 10 million decisions by layer and expert took 0.18 s through "
        "`decisions` and 0.10 s\nby unnesting `routing` by hand, on two cores.\n"
    ]
    parts += [_section(view) for view in VIEWS]
    return "".join(parts)


def _section(entry: Table | View) -> str:
    rows = [f"| `{c.name}` | {c.type} | {c.comment.replace('|', chr(92) + '|')} |" for c in entry.columns]
    head = f"\n### `{entry.name}`\n\n{entry.comment[0].upper()}{entry.comment[1:]}.\n\n"
    return head + "| column | type | meaning |\n|---|---|---|\n" + "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.stdout.write(as_markdown())
