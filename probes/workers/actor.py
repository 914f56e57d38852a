"""A worker: loads the model for itself, and records the batches it is given, each task into a store of its own."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from moescope.core.errors import InputError
from moescope.probes.batches import Batch
from moescope.probes.live_model import LiveModel
from moescope.probes.plan_walk import PlanWalk
from moescope.probes.routing_rule import BoundRule
from moescope.probes.workers.job import Job, Outcome, Refusal, Task
from moescope.probes.workers.shard_recording import ShardRecording
from moescope.store.store import Store


class ShardWorker:
    """One worker. Ray makes an actor of it; it works as well without Ray.

    Args:
        job: what all workers are told.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._model: LiveModel | None = None
        self._walk: PlanWalk | None = None
        self._rules: Mapping[tuple[int, str], BoundRule] | None = None

    def prepare(self) -> Outcome:
        """Load the model, read the corpus, and try on its first batch whatever the run will do."""
        try:
            self._prepare()
        except Exception as error:  # noqa: BLE001  it is told to the program that asked, which raises it
            return Outcome(Refusal.of(error))
        return Outcome()

    def record(self, task: Task) -> Outcome:
        """Record the batches of a task, as far as the plan has them."""
        try:
            return self._record(task)
        except Exception as error:  # noqa: BLE001  it is told to the program that asked, which raises it
            return Outcome(Refusal.of(error))

    def _prepare(self) -> None:
        import torch

        from moescope.probes.loading import load

        job = self._job
        if not (Path(job.folder) / job.marker).is_file():
            raise InputError(
                "a worker does not see the folder for shards",
                expected="one folder that every machine of the cluster sees under the same path",
                found=job.folder,
                fix="put the store, or shards=…, on a file system that they share",
            )
        with suppress(OSError):  # of a cluster's machine, where absolute paths are needed
            os.chdir(job.cwd)
        torch.set_num_threads(job.threads)
        self._model = load(job.model, **job.load_options)
        # What another process counted in the corpus is not to be trusted here: files on this machine may be others.
        corpus = copy.copy(job.corpus)
        corpus._facts = None
        if corpus.facts().fingerprint != job.fingerprint:
            raise InputError(
                f"a worker reads another corpus at {corpus.name}",
                expected=f"fingerprint {job.fingerprint}",
                found=corpus.facts().fingerprint,
                fix="give every machine the same file",
            )
        self._corpus = corpus
        trial = Path(job.folder) / f"trial-{id(self)}-{Path(job.marker).stem}.duckdb"
        try:
            with Store(trial) as store:
                first = self._recording(store, [], None)
        finally:
            trial.unlink(missing_ok=True)
        self._rules = first.context.rules
        self._walk = PlanWalk(first.whole)

    def _record(self, task: Task) -> Outcome:
        if self._walk is None:
            self._prepare()
        assert self._walk is not None
        batches = self._walk.take(range(task.first, task.end))
        if not batches:
            return Outcome(plan_batches=self._walk.length)
        path = Path(self._job.folder) / task.file
        with Store(path) as store:
            recording = self._recording(store, batches, self._walk.length)
            recording.run(progress=False)
            tokens = recording.tokens
        characters = sum(len(s.text) or len(s.token_ids) for batch in batches for s in batch.sequences)
        return Outcome(None, str(path), len(batches), tokens, characters, self._walk.length)

    def _recording(self, store: Store, batches: list[Batch], plan_batches: int | None) -> ShardRecording:
        assert self._model is not None
        return ShardRecording(
            self._model,
            self._corpus,
            store,
            name=self._job.name,
            batches=batches,
            plan_batches=plan_batches,
            rules=self._rules,
            **self._job.options,
        )
