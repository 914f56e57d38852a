"""Writes what is generated of docs/methods/: one page for each analysis, and the index of them.

    python docs/method_pages.py           # writes; pages that are not there yet appear with empty hand-written parts
    python docs/method_pages.py --check   # says which generated parts are out of date, and ends with 1

A page holds four parts. Two are generated and stand between marker lines: `head` (the question and the definition, from the
docstring) and `use` (records, parameters, commands, figure). Between and after them stands what people write: the formula,
chance level and interval, traps, and other pages to see. Those survive every run of this program.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from method_recipes import NOT_RUN, RECIPES, recipe_of

from moescope.core.analysis import PROBE_OF_TABLE, SECTION_TITLES, Analysis, Section, analyses

DOCS = Path(__file__).parent
PAGES = DOCS / "methods"
IMAGES = DOCS / "images" / "methods"
FIGURES = PAGES / "figures.json"
HAND = ("Formula", "Chance level and interval", "Traps", "See also")
# Pages beside those of single methods.
GUIDES = {
    "choosing.md": (
        "Choosing a method",
        "which method answers a question, for three kinds of readers, and what a convincing answer looks like",
    )
}
_OPEN = "<!-- {}: written by docs/method_pages.py, do not edit -->"
_CLOSE = "<!-- end of {} -->"
_ARXIV = re.compile(r"(?:arXiv )?\b(\d{4}\.\d{5})\b")
_MARKUP = re.compile(r"[\\*$<\[\]]|(?<!\w)_|_(?!\w)")
_SECTION = re.compile(r"^(Args|Raises|Returns|Example|Examples|Note|Notes):\s*$", re.MULTILINE)


def main() -> None:
    """Write or check every page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 where something is out of date")
    given = parser.parse_args()
    stale = [path for path, text in pages() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if given.check:
        for path in stale:
            sys.stdout.write(f"out of date: {path.relative_to(DOCS.parent)}\n")
        sys.exit(bool(stale))
    PAGES.mkdir(exist_ok=True)
    for path, text in pages():
        if path in stale:
            path.write_text(text, encoding="utf-8")
    sys.stdout.write(f"{len(stale)} pages written\n")


def pages() -> Iterator[tuple[Path, str]]:
    """Every page as it ought to be: its path, and its text with the hand-written parts it has."""
    facts = figure_facts()
    yield PAGES / "index.md", index()
    for entry in sorted(analyses, key=lambda a: a.name):
        path = PAGES / f"{entry.name}.md"
        before, after = hand_written(path)
        head, use = _marked("head", head_of(entry)), _marked("use", use_of(entry, facts.get(entry.name)))
        yield path, f"{head}\n\n{before}\n\n{use}\n\n{after}\n"


def hand_written(path: Path) -> tuple[str, str]:
    """What people wrote on a page, before and after its part `use`; empty headings where there is no page yet."""
    blank = [f"## {title}" for title in HAND]
    if not path.exists():
        return "\n\n".join(blank[:3]), blank[3]
    text = path.read_text(encoding="utf-8")
    head_end, use_open, use_end = _CLOSE.format("head"), _OPEN.format("use"), _CLOSE.format("use")
    missing = [mark for mark in (head_end, use_open, use_end) if text.count(mark) != 1]
    if missing:
        raise SystemExit(f"{path}: the line {missing[0]!r} must stand in it once")
    before = text[text.index(head_end) + len(head_end) : text.index(use_open)]
    return before.strip(), text[text.index(use_end) + len(use_end) :].strip()


def head_of(entry: Analysis) -> str:
    """Title, question, definition and source."""
    _, body, _ = docstring(entry)
    section = (
        f"Section: [{SECTION_TITLES[entry.section]}](index.md#{anchor(SECTION_TITLES[entry.section])})."
        if entry.section
        else ""
    )
    runs = f" Compares {entry.runs} runs." if entry.runs > 1 else ""
    source = _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", escaped(entry.source.rstrip(".")))
    return (
        f"# {entry.name}\n\n**{escaped(entry.summary)}**\n\n{section}{runs}\n\n"
        f"## Definition\n\n{escaped(body)}\n\nSource: {source}."
    )


def use_of(entry: Analysis, facts: dict[str, Any] | None) -> str:
    """Records, parameters, how to run it, and an example."""
    return "\n\n".join([_reads(entry), _parameters(entry), _how_to_run(entry), _example(entry, facts)])


def _reads(entry: Analysis) -> str:
    if not entry.needs:
        return "## What it reads\n\nThe run, and the records of the measure that is asked for."
    tables = ", ".join(f"[`{table}`](../store.md#{table})" for table in entry.needs)
    of_sae = {"features", "feature_contexts", "feature_experts", "sae_measures", "sparse_probes", "feature_links"}
    made = of_sae | {"descriptions", "mlp_students", "effects", "heads", "head_sequences", "layers"}
    probes = sorted({PROBE_OF_TABLE.get(table, table) for table in entry.needs if table not in made})
    listed = ", ".join(f"`{probe}`" for probe in probes)
    by = f" Written by the probe{'s' * (len(probes) > 1)} {listed}." if probes else ""
    return f"## What it reads\n\n{'Tables' if len(entry.needs) > 1 else 'Table'} {tables} of the store.{by}"


def _parameters(entry: Analysis) -> str:
    _, _, meanings = docstring(entry)
    if not entry.parameters:
        return "## Parameters\n\nNone."
    rows = [
        f"| `{name}` | {_default(facts.default)} | {_cell(_choices(facts.describe()))} | {_cell(meanings.get(name, ''))} |"
        for name, facts in entry.parameters.items()
    ]
    return "\n".join(["## Parameters\n", "| parameter | default | values | meaning |", "|---|---|---|---|", *rows])


def _how_to_run(entry: Analysis) -> str:
    recipe = RECIPES[recipe_of(entry)]
    runs = " ".join(f"--run {_quoted(run)}" for run in recipe.runs)
    given = recipe.parameters.get(entry.name, {})
    parameters = "".join(f" --param {_quoted(f'{name}={value}')}" for name, value in given.items())
    lines = [*recipe.commands, f"moescope analyze runs.duckdb {runs} --analysis {entry.name}{parameters}"]
    commands = "\n".join(f"$ {_folded(line)}" for line in lines)
    named = [f'store.run("{run}")' for run in recipe.runs]
    subject = named[0] if len(named) == 1 else f"[{', '.join(named)}]"
    arguments = "".join(f", {name}={value!r}" for name, value in given.items())
    reason = NOT_RUN.get(entry.name)
    mark = f"<!-- not run: {reason} -->\n" if reason else ""
    return f"""## How to run it

Record, then ask; from the command line:

{mark}```console
{commands}
```

or from Python, over the same store:

{mark}```python
import moescope as ms

with ms.Store("runs.duckdb", read_only=True) as store:
    result = ms.analyze({subject}, "{entry.name}"{arguments})
print(result.title)
```"""


def _example(entry: Analysis, facts: dict[str, Any] | None) -> str:
    if facts is None or entry.name in NOT_RUN:
        reason = NOT_RUN.get(entry.name, "the store that figures are drawn from has no records for it")
        return f"## Example\n\nNo figure: {escaped(reason)}."
    title = escaped(facts["title"])
    image = f"![{_alt(facts['title'])}](../images/methods/{entry.name}.png)\n\n" if facts["figure"] else ""
    rest = "" if facts["figure"] else " It is told by its table; there is no figure."
    told = [f"n = {facts['n']:,} {facts['n_unit']}."]
    told += [f"Units: {', '.join(f'`{column}`: {escaped(unit)}' for column, unit in facts['units'].items())}."]
    told += [f"{name}: {escaped(facts[key].rstrip('.'))}." for name, key in _TOLD if facts.get(key)]
    lines = "\n".join(f"- {one}" for one in told)
    return (
        f"## Example\n\n{image}*{title}* (bundled model, {_runs_named(facts['runs'])}).{rest}\n\n"
        f"What the result says of itself:\n\n{lines}"
    )


_TOLD = (("Definition", "definition"), ("Interval", "interval"), ("Chance level", "null"))


def index() -> str:
    """All methods by section, each with its question."""
    parts = [
        "# Methods\n",
        "One page for each analysis: what it asks, the formula, where it comes from, what chance gives, what people misread, "
        "how to run it, and an example from the bundled model. [Analyses](../analyses.md) is the short list with every "
        "parameter.",
    ]
    parts += [f"\n- [{title}]({name}): {what}" for name, (title, what) in GUIDES.items() if (PAGES / name).exists()]
    for section in (*get_args(Section), None):
        members = sorted((a for a in analyses if a.section == section), key=lambda a: (a.order, a.name))
        if members:
            parts.append(f"\n## {SECTION_TITLES[section] if section else 'Not in reports'}\n")
            parts += [f"- [{one.name}]({one.name}.md): {escaped(one.summary)}" for one in members]
    return "\n".join(parts) + "\n"


def docstring(entry: Analysis) -> tuple[str, str, dict[str, str]]:
    """An analysis' docstring in parts: its question, its definition, and parameter → meaning."""
    text = inspect.getdoc(entry.function) or ""
    summary, _, rest = text.partition("\n")
    parts = _SECTION.split(rest)
    named = dict(zip(parts[1::2], parts[2::2], strict=True))
    return summary, parts[0].strip(), dict(_meanings(named.get("Args", "")))


def _meanings(block: str) -> Iterator[tuple[str, str]]:
    for found in re.finditer(r"^ {4}([\w, *]+): (.*(?:\n {5,}.*)*)", block, re.MULTILINE):
        for name in found[1].split(","):
            yield name.strip().lstrip("*"), " ".join(found[2].split())


def figure_facts() -> dict[str, dict[str, Any]]:
    """Analysis → what its example said, as docs/method_figures.py wrote it down."""
    if not FIGURES.exists():
        return {}
    facts: dict[str, dict[str, Any]] = json.loads(FIGURES.read_text(encoding="utf-8"))
    return facts


def escaped(text: str) -> str:
    """Plain text as Markdown: signs that would mark something up are shown; `code` stays code."""
    parts = re.split(r"(`[^`]*`|(?<!\S)\*\w+\*)", text)
    return "".join(
        part if part.startswith(("`", "*")) and len(part) > 2 else _MARKUP.sub(r"\\\g<0>", part) for part in parts
    )


def anchor(heading: str) -> str:
    """The fragment that code hosts and MyST make of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _choices(text: str) -> str:
    return re.sub(r"'([^']*)'", r"`\1`", text)


def _folded(line: str, width: int = 100) -> str:
    """A command on several lines, broken before its flags, none much wider than `width`."""
    lines = [""]
    for part in re.split(r" (?=--)", line):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("   ")
        lines[-1] += f" {part}" if lines[-1] else part
    return " \\\n".join(lines)


def _cell(text: str) -> str:
    return escaped(text).replace("|", "\\|")


def _alt(text: str) -> str:
    return re.sub(r"[\[\]<>$*_\\]", "", text)


def _default(value: Any) -> str:
    return "none" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _quoted(text: str) -> str:
    return f'"{text}"' if " " in text else text


def _runs_named(runs: list[str]) -> str:
    return " and ".join(f"run `{run}`" for run in runs)


def _marked(name: str, text: str) -> str:
    return f"{_OPEN.format(name)}\n\n{text}\n\n{_CLOSE.format(name)}"


if __name__ == "__main__":
    main()
