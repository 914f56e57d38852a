"""`docs/errors.md`: one entry for every error that moescope raises on purpose, read from the source."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from error_sources import GAP, Raised, raised_in

from moescope.core import errors

HEAD = """# Errors

Every error that moescope raises on purpose, in its own words: `…` stands for a name, a number or a path. Look for a part of the
message that is words (on this page, or with the search of the built documentation); what to do stands in the message itself and
here. What needs more than a line is told in [troubleshooting](troubleshooting.md).

| exception | exit code | meaning |
|---|---|---|
{kinds}

All are `ms.MoescopeError`; `StoreError` and `NotRecordedError` are kinds of `InputError`. A message has up to four parts: the
problem, what was expected, what was found and what to do, in Python `error.problem`, `.expected`, `.found` and `.fix`. The command
line prints it to stderr without a traceback and leaves with the exit code. A wrong flag or a missing argument is told by the
command itself, with 2 too. Something else, with a traceback, is a fault of moescope (exit code 4): please report it.

`python docs/generate/pages.py errors` writes this page anew from the source.
"""

# Where an error comes from → the heading it stands under; the longest prefix counts.
AREAS = {
    "moescope": "From Python",
    "moescope.cli": "Command line",
    "moescope.report": "Reports",
    "moescope.core": "Values, results and files",
    "moescope.core.edit": "Edits and interventions",
    "moescope.core.intervention": "Edits and interventions",
    "moescope.core.positions": "Edits and interventions",
    "moescope.core.site": "Sites",
    "moescope.store": "Store",
    "moescope.store.merg": "Merging",
    "moescope.store.import": "Import",
    "moescope.store.export": "Export",
    "moescope.probes": "Recording",
    "moescope.probes.loading": "Models",
    "moescope.probes.live_model": "Models",
    "moescope.probes.foreign": "Models",
    "moescope.probes.anatomy": "Models",
    "moescope.probes.custom_layers": "Models",
    "moescope.probes.families": "Models",
    "moescope.probes.introspection": "Models",
    "moescope.probes.corpus": "Corpora",
    "moescope.probes.plan": "Planning",
    "moescope.probes.edits": "Edits on a live model",
    "moescope.probes.effects": "Effects",
    "moescope.probes.sweeps": "Sweeps and contrasts",
    "moescope.probes.attribution": "Attribution of logits",
    "moescope.probes.phenomena": "Phenomena",
    "moescope.probes.workers": "Workers",
    "moescope.routing": "Analyses",
    "moescope.sae": "Sparse autoencoders",
    "moescope.dashboard": "Dashboard",
}


def errors_page() -> str:
    """The page as Markdown."""
    found = raised_in()
    areas: dict[str, list[Raised]] = {}
    for entry in found:
        areas.setdefault(area(entry.module), []).append(entry)
    listed = [HEAD.format(kinds="\n".join(_kinds()))]
    for title in dict.fromkeys(AREAS.values()):
        if title in areas:
            listed.append(f"\n## {title}\n")
            listed += _entries(areas[title])
    return "".join(listed)


def area(module: str) -> str:
    """The heading that errors of a module stand under."""
    return AREAS[max((prefix for prefix in AREAS if module.startswith(prefix)), key=len)]


def _kinds() -> list[str]:
    order = ("InputError", "StoreError", "NotRecordedError", "IncompleteError", "RunError")
    members = [getattr(errors, name) for name in order]
    return [
        f"| `{kind.__name__}` | {kind.exit_code} | {(kind.__doc__ or '').partition(chr(10))[0]} |" for kind in members
    ]


def _entries(found: Iterable[Raised]) -> list[str]:
    """Entries by module; what differs only in its parts is one entry with several of them."""
    lines = []
    for module, raised in groupby(found, lambda entry: entry.module):
        lines.append(f"\n### {module.removeprefix('moescope.')}\n\n")
        for (problem, kind), same in groupby(raised, lambda entry: (entry.problem, entry.kind)):
            entries = list(same)
            words = (
                as_text(problem) if problem != GAP else f"… (in: {as_text(entries[0].about or 'words of the cause')})"
            )
            code = getattr(errors, kind).exit_code
            lines.append(f"- **{words}** (`{kind}`, exit code {code})\n")
            for label, name in (("Expected", "expected"), ("Found", "found"), ("What to do", "fix")):
                texts = [text for text in dict.fromkeys(getattr(entry, name) for entry in entries) if text]
                if texts:
                    lines.append(f"  - {label}: {'; or: '.join(map(as_text, texts))}\n")
    return lines


def as_text(text: str) -> str:
    """Text that Markdown shows as it is."""
    one_line = " ".join(text.split())
    for character in "\\`*_{}[]<>#|$~":
        one_line = one_line.replace(character, "\\" + character)
    return one_line
