"""`docs/analyses.md`: every analysis with its question, records and parameters, written from the registry."""

from __future__ import annotations

from typing import Any, get_args

from moescope.core.analysis import SECTION_TITLES, Analysis, Section, analyses

_HEAD = """# Analyses

Every analysis is a question to recorded or imported runs. From the command line, `moescope analyze runs.duckdb --analysis NAME
--param name=value`; from Python, `ms.analyze(run, "NAME", name=value)`. Both give the same `Result`: a table, a figure, the
definition, units, sample size, interval and chance level. `moescope analyze runs.duckdb --all` writes all of them that the run
has the records for to one HTML file.

Intervals resample documents. An analysis that needs records which a run does not have says which probe writes them.
`moescope analyze --list --format markdown` prints this page.
"""


def analyses_page() -> str:
    """The page as Markdown.

    Example:
        >>> analyses_page().splitlines()[0]
        '# Analyses'
    """
    parts = [_HEAD]
    for section in (*get_args(Section), None):
        members = sorted((a for a in analyses if a.section == section), key=lambda a: (a.order, a.name))
        if members:
            parts.append(f"\n## {SECTION_TITLES[section] if section else 'Not in reports'}\n")
            parts += [_entry(entry) for entry in members]
    return "".join(parts)


def _entry(entry: Analysis) -> str:
    needs = ", ".join(f"`{table}`" for table in entry.needs) or "nothing besides the run"
    runs = f" Compares {entry.runs} runs." if entry.runs > 1 else ""
    source = entry.source.rstrip(".")
    head = f"\n### `{entry.name}`\n\n{entry.summary}{runs}\n\nReads {needs}. Source: {source}.\n"
    listed = [
        f"- `{name}` = {_default(facts.default)}: {facts.describe()}\n" for name, facts in entry.parameters.items()
    ]
    return "".join([head, *(["\n"] if listed else []), *listed])


def _default(value: Any) -> str:
    return "none" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"
