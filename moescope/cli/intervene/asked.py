"""Interventions as the command line is given them: edits in words, or a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moescope.core.errors import InputError

if TYPE_CHECKING:
    from moescope.core.intervention import Intervention


def asked_intervention(edit: list[str] | None, file: Path | None, *, name: str | None = None) -> Intervention:
    """The intervention that --edit or --intervention give.

    Raises:
        InputError: neither or both, words that are no edit, or a file that is no intervention.
    """
    from moescope.core.edit_text import read_edit
    from moescope.core.intervention import Intervention

    if (edit is None) == (file is None):
        raise InputError(
            "one of --edit and --intervention is needed, and only one",
            fix="--edit 'ablate layer=3 experts=5' (repeatable), or --intervention file.json",
        )
    found = Intervention.load(file) if file is not None else Intervention(map(read_edit, edit or []))
    return found if name is None else found.named(name)
