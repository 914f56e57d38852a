"""Controls, and runs saved: the lab's edits measured by `moescope.effect`, as work that goes on when the tab is closed."""

from __future__ import annotations

import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.core.result import Result
from moescope.dashboard.lab.bench import MAX_LENGTH, Bench
from moescope.dashboard.services import Services
from moescope.dashboard.url_state import ViewState, link
from moescope.dashboard.work import Job, Task
from moescope.dashboard.work_model import on_model
from moescope.store.store import Store

if TYPE_CHECKING:
    from moescope.probes.live_model import LiveModel

BATCH_SIZE = 16
_KEPT = 16

_TEXTS = """
    SELECT text
    FROM sequences
    WHERE run_id = ?
      AND part = 0
      AND text <> ''
    ORDER BY hash(sequence_id)
    LIMIT ?
"""


@dataclass(frozen=True)
class Asked:
    """What is to be measured.

    Attributes:
        intervention: the edits.
        texts: each a document.
        controls: matched random controls.
        generate: tokens that texts are continued by, 0 for none.
        source: the model.
    """

    intervention: Intervention
    texts: tuple[str, ...]
    controls: int
    generate: int
    source: str


class Measuring:
    """Starts measurements and keeps their results.

    Args:
        services: the app's.
        bench: knows the autoencoders that edits name.

    Attributes:
        last: the number of the newest job that was started here.
    """

    def __init__(self, services: Services, bench: Bench) -> None:
        self._services, self._bench = services, bench
        self._results: OrderedDict[int, Result] = OrderedDict()
        self.last: int | None = None

    def result(self, number: int) -> Result | None:
        """What a job found; None where it is not done."""
        return self._results.get(number)

    def job(self, number: int) -> Job | None:
        """A job by its number."""
        return next((job for job in self._services.work.jobs() if job.number == number), None)

    def controls(self, asked: Asked) -> Job:
        """Measure against matched random controls; nothing is kept in the store."""

        def task(job: Job) -> str | None:
            def measure(model: LiveModel) -> str:
                folder = Path(tempfile.mkdtemp(prefix="moescope-lab-"))
                try:
                    with Store(folder / "lab.duckdb") as store:
                        self._keep(job, self._effect(model, asked, store))
                finally:
                    shutil.rmtree(folder, ignore_errors=True)
                return ""

            return on_model(self._services.models, asked.source, job, measure) or None

        return self._started(f"Controls of {_called(asked.intervention)}", task)

    def save(self, asked: Asked, name: str) -> Job:
        """Record the texts under the intervention as a run, with its effect.

        Raises:
            InputError: a store that cannot be written to, no name, or one that is taken.
        """
        services = self._services
        if not services.writable:
            raise InputError("nothing can be saved into this store", found=services.why_not or "open for reading only")
        if not name.strip():
            raise InputError("the run needs a name", fix="write one")
        if any(run.name == name for run in services.store.runs()):
            raise InputError(f"the store already has a run called {name!r}", fix="choose another name")

        def task(job: Job) -> str | None:
            def measure(model: LiveModel) -> str:
                result = self._effect(model, asked, services.store, keep_run=name)
                self._keep(job, result)
                base = (result.provenance or {}).get("name")
                return link("/compare", ViewState(run=str(base), other=name))

            found = on_model(services.models, asked.source, job, measure)
            services.answers.forget()
            return found

        return self._started(f"Run {name}: {_called(asked.intervention)}", task)

    def _started(self, title: str, task: Task) -> Job:
        job = self._services.work.start(title, task)
        self.last = job.number
        return job

    def _effect(self, model: LiveModel, asked: Asked, store: Store, *, keep_run: str | None = None) -> Result:
        import moescope as ms

        return ms.effect(
            model,
            list(asked.texts),
            asked.intervention,
            store,
            controls=asked.controls,
            generate=asked.generate,
            batch_size=BATCH_SIZE,
            max_length=MAX_LENGTH,
            keep_run=keep_run,
            sources=self._bench.sources(model, asked.intervention),
            progress=False,
        )

    def _keep(self, job: Job, result: Result) -> None:
        self._results[job.number] = result
        while len(self._results) > _KEPT:
            self._results.popitem(last=False)


def texts_for(choice: str, prompts: Sequence[str], store: Store, run_name: str | None, *, most: int = 64) -> list[str]:
    """The texts to measure on: `prompts`, `demo` (the demo corpus) or `run` (texts of the run).

    Raises:
        InputError: no texts of that choice.
    """
    if choice == "demo":
        from moescope.dashboard.lab.asking import demo_texts

        return demo_texts()[:most]
    if choice == "run":
        if run_name is None:
            raise InputError("there is no run to take texts of", fix="choose other texts")
        texts = [str(text) for (text,) in store.fetch(_TEXTS, [store.run(run_name).run_id, most])]
        if not texts:
            raise InputError(f"{run_name} kept no texts", fix="choose other texts")
        return texts
    if not prompts:
        raise InputError("there is no prompt", fix="write one, a line each")
    return list(prompts)


def _called(intervention: Intervention) -> str:
    """A short name from the edits."""
    from moescope.dashboard.lab.lines import for_address

    lines, kept = for_address(intervention.edits)
    words = [*lines, *(edit.kind for edit in kept)]
    text = "; ".join(words)
    return text if len(text) <= 80 else f"{text[:79]}…"
