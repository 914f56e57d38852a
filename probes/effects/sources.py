"""What edits name: recorded runs that they replay, and autoencoders that they go through."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from moescope.core.edit_kinds.features import FeatureEdit
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.store.run import Run
from moescope.store.store import Store


def sources_of(intervention: Intervention, store: Store, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Name → run, for every edit that names one (SetRouting, Patch), beside what was given: autoencoders, and runs of other stores.

    Raises:
        InputError: the store has no run of such a name, or a run and an autoencoder share one.
    """
    names = dict.fromkeys(name for edit in intervention.edits if (name := getattr(edit, "run", None)))
    through = set(autoencoder_names([intervention]))
    if both := [name for name in names if name in through]:
        raise InputError(
            f"{both[0]!r} is named as a run and as an autoencoder", fix="give one of them another name in the store"
        )
    given = given or {}
    return {**given, **{name: own if isinstance(own := given.get(name), Run) else store.run(name) for name in names}}


def autoencoder_names(interventions: Iterable[Intervention]) -> list[str]:
    """The autoencoders that edits go through, each once.

    Example:
        >>> from moescope.edits import Add, Splice
        >>> autoencoder_names([Intervention([Splice(layer=1, sae="a"), Splice(layer=2, sae="b")])])
        ['a', 'b']
    """
    edits = (edit for intervention in interventions for edit in intervention.edits)
    return list(dict.fromkeys(edit.sae for edit in edits if isinstance(edit, FeatureEdit)))
