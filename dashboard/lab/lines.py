"""The edits of the address as the lab's list shows them, and the same intervention as JSON, Python and a command."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moescope.core.edit import Edit
from moescope.core.edit_text import read_edit, write_edit
from moescope.core.errors import InputError, MoescopeError
from moescope.core.intervention import Intervention

LONGEST = 400
"""Characters of an edit that the address may hold; longer ones stay in the tab."""

# What docs/edits.md says of strengths: done or not done; part of the way; any.
_WHOLE = ("force", "keep", "top_k", "rank_routing", "top_p", "random_routing", "swap_experts", "set_routing")
_PART = ("clamp", "fake_quant", "mask_head", "patch", "project_out", "set_channel", "skip", "splice")
RANGES = {"whole": (0.0, 1.0, 1.0), "part": (0.0, 1.0, 0.05), "any": (-2.0, 2.0, 0.05)}
"""Lowest, highest and step of a slider."""


def strengths(edit: Edit) -> str:
    """Which strengths an edit takes: `whole` (0 or 1), `part` (0 to 1) or `any`.

    Example:
        >>> strengths(read_edit("top_k k=1")), strengths(read_edit("skip layer=2")), strengths(read_edit("bias experts=1"))
        ('whole', 'part', 'any')
    """
    if edit.kind in _WHOLE or getattr(edit, "how", None) == "route_around":
        return "whole"
    return "part" if edit.kind in _PART else "any"


def row(line: str) -> dict[str, Any]:
    """One edit for the list: its line without strength, its strength and the slider's range; or why it is none.

    Example:
        >>> row("ablate strength=0.5 layer=3 experts=5")["base"], row("ablate layer=3")["problem"]["problem"]
        ('ablate layer=3 experts=5', 'ablate: experts cannot be ()')
    """
    try:
        edit = read_edit(line)
        return {"line": line, "base": write_edit(replace(edit, strength=1.0)), **_slider(edit)}
    except MoescopeError as refused:
        return {"line": line, "problem": told(refused)}


def row_of(edit: Edit) -> dict[str, Any]:
    """The same of an edit that no address can hold, told in short."""
    return {"line": repr(replace(edit, strength=1.0)), **_slider(edit)}


def _slider(edit: Edit) -> dict[str, float]:
    low, high, step = RANGES[strengths(edit)]
    return {"strength": edit.strength, "low": min(low, edit.strength), "high": max(high, edit.strength), "step": step}


def told(refused: MoescopeError) -> dict[str, str]:
    """A refusal as the page shows it beside what caused it."""
    parts = {name: getattr(refused, name) for name in ("problem", "expected", "found", "fix")}
    return {name: str(text) for name, text in parts.items() if text}


def for_address(edits: Sequence[Edit]) -> tuple[list[str], list[Edit]]:
    """Lines for the address, and the edits that no address can hold: vectors, and names with a semicolon."""
    lines: list[str] = []
    kept: list[Edit] = []
    for edit in edits:
        try:
            line = write_edit(edit)
        except InputError:
            kept.append(edit)
            continue
        if len(line) > LONGEST or ";" in line:
            kept.append(edit)
        else:
            lines.append(line)
    return lines, kept


def read_all(lines: Sequence[str], kept: str | None) -> tuple[list[Edit | None], list[dict[str, str] | None]]:
    """Every edit of the list, None where a line is none, and beside it why.

    Args:
        lines: of the address.
        kept: an intervention as JSON, of what the address cannot hold; those come last.
    """
    edits: list[Edit | None] = []
    problems: list[dict[str, str] | None] = []
    for line in lines:
        try:
            edits.append(read_edit(line))
            problems.append(None)
        except MoescopeError as refused:
            edits.append(None)
            problems.append(told(refused))
    more = Intervention.from_json(kept).edits if kept else ()
    return [*edits, *more], [*problems, *[None] * len(more)]


def as_python(intervention: Intervention, source: str | None) -> str:
    """The intervention as a script.

    Example:
        >>> print(as_python(Intervention([read_edit("ablate layer=3 experts=5")]), "demo").splitlines()[4])
            ms.edits.Ablate(layer=3, experts=[5]),
    """
    edits = [f"    {_call(edit)}," for edit in intervention.edits]
    return "\n".join(
        [
            "import moescope as ms",
            "",
            f"model = ms.load({source or 'demo'!r})",
            "edited = ms.Intervention([",
            *edits,
            "])",
            "with model.edited(edited):",
            "    ...  # anything run in here is edited",
            "",
        ]
    )


def as_command(intervention: Intervention, source: str | None, store: str) -> str:
    """The command that measures the intervention's effect.

    Raises:
        InputError: an edit that no line can hold.
    """
    words = [f"--edit {shlex.quote(write_edit(edit))}" for edit in intervention.edits]
    return " ".join(["moescope intervene effect", shlex.quote(source or "demo"), *words, "--store", shlex.quote(store)])


def _call(edit: Edit) -> str:
    defaults = {f.name: f.default for f in dataclasses.fields(edit)}
    given = {n: v for n, v in edit.as_data().items() if v is not None or defaults[n] is not None}
    said = (f"{name}={_listed(value)!r}" for name, value in given.items())
    return f"ms.edits.{type(edit).__name__}({', '.join(said)})"


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value
