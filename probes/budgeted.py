"""A recording within a budget: what its plan keeps, or, where it goes on with a stopped run, what that run kept."""

from __future__ import annotations

from typing import Any

from moescope.probes.corpus import Corpus
from moescope.probes.live_model import LiveModel
from moescope.probes.planning import plan
from moescope.store.store import Store

_CHOSEN = ("probes", "sites", "sample")


def budgeted(
    model: LiveModel,
    corpus: Corpus,
    store: Store,
    *,
    name: str,
    budget: str | int,
    resume: bool,
    progress: bool,
    asked: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, float] | None]:
    """Probes, sites and sample that fit a budget, and what the plan says that they take.

    A stopped run that is resumed keeps its choice, for a second plan may come to another: then there is no plan, and what was
    planned before stays with the run.

    Args:
        model, corpus, store, name, resume, progress: of the recording.
        budget: bytes, as `moescope.plan` takes them.
        asked: the other arguments of `moescope.plan`.

    Raises:
        InputError: what `moescope.plan` refuses.
    """
    stopped = [run for run in store.runs() if resume and run.name == name]
    if stopped:
        settings = stopped[0].info["settings"]
        return {key: settings[key] for key in _CHOSEN}, None
    made = plan(model, corpus, **asked, budget=budget, store=store.path, progress=progress)
    return {key: getattr(made, key) for key in _CHOSEN}, made.planned()
