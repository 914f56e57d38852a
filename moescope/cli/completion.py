"""What Tab offers: run names, analyses, parameters, probes, edits and tables, without loading what they stand for.

Names in code are read from its text, because importing the analyses takes longer than a person waits for Tab. A store is
opened for reading alone, and one that is missing, locked or damaged offers nothing. Names that a shell would not take as
they stand are left out.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import typer

_ANALYSIS = re.compile(
    r"^@analysis\(\s*name=\"(\w+)\"(.*?)^def \w+\((.*?)\) ->.*?:\n\s+[rf]?\"\"\"(.*?)(?:\n|\"\"\")", re.S | re.M
)
_PROBE = re.compile(r"^@probe\(\s*name=\"(\w+)\".*?\"\"\"(.*?)(?:\n|\"\"\")", re.S | re.M)
_EDIT = re.compile(r"^@edit\(\"(\w+)\"\).*?\"\"\"(.*?)(?:\n|\"\"\")", re.S | re.M)
_TABLE = re.compile(r"^    Table\(\s*\"(\w+)\",\s*\"(.*?)\"", re.M)
_PARAMETER = re.compile(r"(\w+)\s*:")
_PLAIN = re.compile(r"[\w@%+=:,./-]+")  # what a shell takes as it stands
_STEERS = re.compile(r"[^\w ,.:/-]")

Offers = list[tuple[str, str]]


def run_names(ctx: typer.Context, incomplete: str) -> Offers:
    """Names of the runs of the store that is typed, or of `runs.duckdb`."""
    return _from_store(ctx, incomplete, "SELECT name, model || ', ' || status FROM runs ORDER BY name")


def autoencoder_names(ctx: typer.Context, incomplete: str) -> Offers:
    """Names of the autoencoders of the store that is typed."""
    return _from_store(ctx, incomplete, "SELECT name, architecture || ' at ' || site FROM saes ORDER BY name")


def table_names(incomplete: str) -> Offers:
    """Tables of a store, the last of several with commas between them."""
    return _last(
        incomplete,
        ((name, text) for path in _sources("moescope.store", "schema.py") for name, text in _TABLE.findall(path)),
    )


def probe_names(incomplete: str) -> Offers:
    """Probes, the last of several with commas between them."""
    return _last(
        incomplete, sorted(match for text in _sources("moescope.probes.recorders") for match in _PROBE.findall(text))
    )


def analysis_names(incomplete: str) -> Offers:
    """Analyses, the last of several with commas between them."""
    return _last(incomplete, sorted((name, summary) for name, (summary, _) in _analyses().items()))


def parameter_names(ctx: typer.Context, incomplete: str) -> Offers:
    """Parameters of the analyses that are typed, each as `name=`."""
    typed = [part for text in ctx.params.get("analysis") or () for part in str(text).split(",")]
    known = _analyses()
    return [
        (f"{parameter}=", f"of {name}")
        for name in typed
        for parameter in known.get(name, ("", ()))[1]
        if f"{parameter}=".startswith(incomplete)
    ]


def edit_words(incomplete: str) -> Offers:
    """Kinds of edits, the first word of one."""
    found = sorted(match for text in _sources("moescope.core.edit_kinds") for match in _EDIT.findall(text))
    return [(name, said) for name, said in found if name.startswith(incomplete)]


def _analyses() -> dict[str, tuple[str, tuple[str, ...]]]:
    """The first line and the parameters of every analysis."""
    found = {}
    for text in _sources("moescope.routing"):
        for name, _, parameters, summary in _ANALYSIS.findall(text):
            found[name] = (summary, tuple(_PARAMETER.findall(parameters.partition("*,")[2])))
    return found


def _sources(package: str, pattern: str = "*.py") -> Iterator[str]:
    """The text of the modules of a package, and of the packages in it."""
    found = importlib.util.find_spec(package)
    for folder in () if found is None else found.submodule_search_locations or ():
        for path in sorted(Path(folder).rglob(pattern)):
            yield path.read_text(encoding="utf-8")


def _last(incomplete: str, known: Iterable[tuple[str, str]]) -> Offers:
    before, comma, begun = incomplete.rpartition(",")
    return [(f"{before}{comma}{name}", said) for name, said in known if name.startswith(begun)]


def _from_store(ctx: typer.Context, incomplete: str, query: str) -> Offers:
    path = Path(str(ctx.params.get("store") or "runs.duckdb"))
    if not path.is_file():
        return []
    import duckdb

    from moescope.core.errors import StoreError
    from moescope.store.opening import open_connection

    try:
        store = open_connection(path, read_only=True)  # locked down: its views read no other file
    except StoreError:
        return []  # locked by who writes, damaged, or no store: Tab says nothing
    try:
        rows = [(str(name), str(said)) for name, said in store.execute(query).fetchall()]
    except duckdb.Error:
        return []
    finally:
        store.close()
    # The shell puts what is chosen into the command line, where text of a stranger must not run.
    return [
        (name, _STEERS.sub("", said))
        for name, said in rows
        if _PLAIN.fullmatch(name) and not name.startswith("-") and name.startswith(incomplete)
    ]
