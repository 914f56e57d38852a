"""Recorded runs that edits replay."""

from __future__ import annotations

from moescope.core.intervention import Intervention
from moescope.store.run import Run
from moescope.store.store import Store


def sources_of(intervention: Intervention, store: Store) -> dict[str, Run]:
    """Run name → run, for every edit that names one (SetRouting, Patch).

    Raises:
        InputError: the store has no run of such a name.
    """
    names = dict.fromkeys(name for edit in intervention.edits if (name := getattr(edit, "run", None)))
    return {name: store.run(name) for name in names}
