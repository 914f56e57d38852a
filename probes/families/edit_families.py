"""Which edits each family takes: found by building it tiny and checking a trial edit of every kind in every layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from moescope.probes.edits.support import Support, edit_support
from moescope.probes.families.support import supported_types
from moescope.probes.families.tiny import build_tiny
from moescope.probes.live_model import LiveModel

COLUMNS = ("model type", "edits", "where", "reason")


def edit_families(
    types: Iterable[str] | None = None, *, each: Callable[[str], None] = lambda _: None
) -> dict[str, dict[str, Support]]:
    """Model type → kind of edit → where it works; `each` is called with a type before it is looked at.

    Example:
        >>> edit_families(["olmoe"])["olmoe"]["ablate zero"].reason is None
        True
    """
    found = {}
    for name in types or supported_types():
        each(name)
        found[name] = edit_support(LiveModel(build_tiny(name), None, name=name))
    return found


def refusal_rows(found: Mapping[str, Mapping[str, Support]]) -> list[tuple[str, str, str, str]]:
    """One row a model type and reason: the edits that are refused for it, and whether in every layer or only in some."""
    rows = []
    for model_type, table in found.items():
        by_reason: defaultdict[tuple[str, bool], list[str]] = defaultdict(list)
        for support in table.values():
            if support.reason is not None:
                by_reason[support.reason, support.works].append(support.edit)
        for (reason, works), kinds in by_reason.items():
            named = "every edit" if len(kinds) == len(table) else ", ".join(kinds)
            rows.append((model_type, named, "some layers" if works else "every layer", reason))
    return rows


def as_markdown(found: Mapping[str, Mapping[str, Support]]) -> str:
    """The lists as they stand in the documentation."""
    refused = refusal_rows(found)
    without = [name for name in found if name not in {row[0] for row in refused}]
    lines = [
        f"These {len(without)} model types take every edit: {', '.join(without)}.",
        "",
        "The others refuse some:",
        "",
    ]
    table = [COLUMNS, ("---",) * len(COLUMNS), *refused]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    return "\n".join(lines) + "\n"
