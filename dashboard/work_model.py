"""Long work on a live model: in the line with the lab where both use the same one, else on a copy of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from moescope.dashboard.model_host import ModelHost
from moescope.dashboard.work import Job

if TYPE_CHECKING:
    from moescope.probes.live_model import LiveModel

_PATIENCE_SECONDS = 15.0


def on_model(host: ModelHost, source: str, job: Job, do: Callable[[LiveModel], str]) -> str:
    """Do a job on the model called `source`, following what it tells.

    A job that is cancelled ends at its next step, so that what it recorded is closed in order; only where no step comes for
    some time is the model stopped under it.
    """
    begun = False

    def request(live: LiveModel) -> str:
        nonlocal begun
        begun = True
        with job.watch():
            return do(live)

    if host.source is None:
        host.choose(source)
    if host.source != source:
        from moescope.probes.loading import load

        job.tell(0, words=f"loading {source}")
        return request(load(source))

    job.tell(0, words="waiting for the model")
    asked: float | None = None

    def still() -> None:
        nonlocal asked
        if job.stopping:
            asked = asked or time.monotonic()
            if not begun or time.monotonic() - asked > _PATIENCE_SECONDS:
                job.tell(job.done, job.total)

    return host.ask(request, who=f"work {job.number}", words=job.title, still=still)
