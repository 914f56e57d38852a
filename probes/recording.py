"""`Recording`: one pass of a corpus through a live model, from the first look to the settled ledger."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from moescope.core.errors import InputError, MoescopeError
from moescope.core.intervention import Intervention
from moescope.core.site_names import read_site
from moescope.core.sites import Site
from moescope.core.versions import library_versions
from moescope.probes.anatomy import Sublayer
from moescope.probes.batches import Batch, BatchPlan, Side
from moescope.probes.choices import check_part, check_room, check_sizes, chosen_probes, longest
from moescope.probes.claim import claimed
from moescope.probes.corpus import Corpus, CorpusFacts
from moescope.probes.effects.edited_recording import EditedRecording, in_force
from moescope.probes.failures import explained, reason_of
from moescope.probes.forward import to_device
from moescope.probes.live_model import LiveModel
from moescope.probes.passes import BatchSteps, Passes, joined
from moescope.probes.plan_walk import PlanWalk
from moescope.probes.probe import Probe, ProbeContext
from moescope.probes.progress import RunProgress
from moescope.probes.selfcheck import first_look
from moescope.probes.stopping import check_reached, check_same, check_stop
from moescope.probes.trial import look_first
from moescope.store.coverage import Expectation
from moescope.store.ending import end_run
from moescope.store.measured_bytes import bytes_before, note_costs
from moescope.store.resuming import Stopped, reopen, stopped_run
from moescope.store.run import Run
from moescope.store.store import Store
from moescope.store.writer import BatchRecords, RunWriter


class Recording:
    """One call of `record`, from the checks to the ledger. Everything is checked before the run is entered."""

    def __init__(
        self,
        model: LiveModel,
        corpus: Corpus,
        store: Store,
        *,
        name: str,
        probes: Sequence[str] | None = None,
        sites: Sequence[str | Site] = (),
        sample: float = 1.0,
        intervention: Intervention | None = None,
        sources: Mapping[str, Any] | None = None,
        generate: int = 0,
        batch_size: int = 8,
        max_length: int = 512,
        padding: str | None = None,
        seed: int = 0,
        resume: bool = False,
        batches: range | None = None,
        planned: Mapping[str, float] | None = None,
        stop_after: int | None = None,
    ) -> None:
        check_part(batches, resume=resume)
        check_sizes(batch_size, max_length, generate, sample, padding)
        store.check_writable()
        check_room(store)
        self.model, self.corpus, self.store, self.name, self.seed = model, corpus, store, name, seed
        self.edits = (
            None
            if intervention is None
            else EditedRecording(model, intervention, store, generate=generate, sources=sources)
        )
        self._intervention = in_force(model) if self.edits is None else self.edits.as_json()
        self.generate, self.planned, self._bytes_before = generate, planned, 0
        self.stop_after = stop_after
        if stop_after is not None:
            self._check_stop(stop_after)
        self.side: Side = "left" if padding == "left" or (generate and padding is None) else "right"
        read = tuple(dict.fromkeys(read_site(site, model.anatomy) for site in sites))
        self.entries, self.left_out = chosen_probes(model, probes, read)
        self.facts: CorpusFacts = corpus.facts()
        self.max_length = longest(model, max_length, generate)
        self.plan = BatchPlan(corpus, model.tokenizer, batch_size, self.max_length, model.anatomy.vocabulary)
        self.batches = batches
        self.walk = None if batches is None else PlanWalk(self.plan)
        self.context = ProbeContext(
            model.anatomy if self.edits is None else self.edits.anatomy,
            model.tokenizer,
            sites=read,
            share=sample,
            seed=seed,
        )
        self.prefilled = self.generated = self.sequences = self._next_token = 0
        self.before: Stopped | None = self._stopped() if resume else None
        with claimed(model.module, name):
            self.probes = self._looked_first()
        if self.before is not None:
            self._go_on_from(self.before)

    def _looked_first(self) -> list[Probe]:
        """The probes, once what the run will do was tried."""
        probes = look_first(
            self.model,
            self.plan,
            self.entries,
            self.context,
            side=self.side,
            generate=self.generate,
            edits=self.edits,
        )
        if self.stop_after is not None:
            anatomy = self.model.anatomy
            named = zip((entry.name for entry in self.entries), probes, strict=True)
            sites = [(name, site) for name, probe in named for site in probe.sites(anatomy)]
            check_reached(sites, self.stop_after)
            look = to_device(first_look(next(iter(self.plan))), self.model, side=self.side)
            check_same(self.model, look, [site for _, site in sites], self.stop_after)
        return probes

    def _check_stop(self, layer: int) -> None:
        """Raise `InputError` where a run cannot do without what follows a block."""
        check_stop(self.model, layer)
        if self.generate:
            raise InputError(
                "passes that stop on the way cannot continue a text",
                found=f"stop_after={layer} and generate={self.generate}",
                fix="leave out stop_after, or generate",
            )
        if self._intervention is not None:
            raise InputError(
                "passes under an intervention run to their end: only logits tell whether it spoilt them",
                found=f"stop_after={layer} and an intervention",
                fix="leave out stop_after, or the intervention",
            )

    def _stopped(self) -> Stopped | None:
        """The run of this name as it was left, if there is one."""
        plan = {
            "model": self.model.name,
            "revision": self.model.revision,
            "corpus_fingerprint": self.facts.fingerprint,
            "seed": self.seed,
            "settings": self._settings(),
        }
        widths = {(s.layer, s.block): s.n_choices for s in self.model.anatomy.moe}
        return stopped_run(self.store, self.name, plan, widths)

    def _go_on_from(self, before: Stopped) -> None:
        self.generated, self.sequences, self._next_token = before.generated, before.sequences, before.tokens
        self.prefilled = before.tokens - before.generated
        self.planned = before.state.get("planned", self.planned)
        self._bytes_before = before.state.get("bytes_before", 0)
        for site, problem in before.state.get("problems", {}).items():
            self.context.report(site, problem)
        for probe, entry in zip(self.probes, self.entries, strict=True):
            probe.restore(before.state.get("probes", {}).get(entry.name, {}))

    def run(self, *, progress: bool) -> Run:
        """Record, settle the ledger, give the run its final status."""
        if self.before is not None and self.before.run.complete:
            return self.before.run
        with claimed(self.model.module, self.name):
            run = self._begin()
            started = time.perf_counter() - (self.before.seconds if self.before else 0.0)
            writer = RunWriter(
                self.store,
                run.run_id,
                progress=lambda: self._progress(time.perf_counter() - started),
                after=self.before,
            )
            passes = Passes(
                self.model,
                self.probes,
                self.context,
                generate=self.generate,
                side=self.side,
                stop_after=self.stop_after,
            )
            failure: BaseException | None = None
            try:
                self._forward_passes(passes, writer, started, progress=progress)
            except BaseException as error:  # noqa: BLE001  the run must be closed whatever happened; raised again below
                failure = error
        try:
            writer.close()
        except MoescopeError as error:
            failure = error if failure is None or isinstance(failure, MoescopeError) else failure
        for probe in self.probes:
            probe.close()
        passes.report_silence()
        self._end(run, time.perf_counter() - started, failure)
        if failure is None:
            return run
        if isinstance(failure, (MoescopeError, KeyboardInterrupt)):
            raise failure
        raise explained(failure) from failure

    def _forward_passes(self, passes: Passes, writer: RunWriter, started: float, *, progress: bool) -> None:
        with (
            RunProgress(f"recording {self.name}", self.facts.characters, shown=progress) as bar,
            nullcontext() if self.edits is None else self.edits.open(),
            passes.open(),
        ):
            for batch in self._planned():
                if self.before is not None and batch.number < self.before.batches:
                    bar.advance_to(batch.characters, self.tokens, time.perf_counter() - started)
                    continue
                if self.edits is not None:
                    self.edits.begin(batch.sequences)
                finish = passes.run(batch)
                if self.edits is not None:
                    self.edits.check()
                # Counted before they are handed over: whatever interrupts here, nothing is in the store uncounted.
                self.prefilled += batch.tokens
                self.sequences += len(batch.sequences)
                writer.submit(self._rows_later(finish))
                bar.advance_to(batch.characters, self.tokens, time.perf_counter() - started)

    def _planned(self) -> Iterable[Batch]:
        """The batches to record."""
        return self.plan if self.walk is None or self.batches is None else self.walk.between(self.batches)

    @property
    def tokens(self) -> int:
        """Tokens that went through the model so far, as far as is known: those of a batch's answer once its rows are made."""
        return self.prefilled + self.generated

    def _rows_later(self, finish: Callable[[], BatchSteps]) -> Callable[[], BatchRecords]:
        def make_rows() -> BatchRecords:
            steps = finish()
            batch = steps.batch
            tokens = batch.tokens + int(steps.generated.sum())
            parts = []
            for host in steps.host_batches(self._next_token):
                parts.append(BatchRecords(batch.number, (0, 0, 0)))
                for probe in self.probes:
                    probe.rows(host, parts[-1])
            self._next_token += tokens
            self.generated += int(steps.promised.sum())
            return joined(batch, tokens, parts)

        return make_rows

    def _progress(self, seconds: float) -> dict[str, Any]:
        """What the run needs to go on after its last whole chunk."""
        state = {
            "planned": self.planned,
            "bytes_before": self._bytes_before,
            "problems": dict(self.context.problems),
            "probes": {e.name: probe.state() for e, probe in zip(self.entries, self.probes, strict=True)},
        }
        return {"state": state, "seconds": round(seconds, 3)}

    def _settings(self) -> dict[str, Any]:
        return {
            "probes": [e.name for e in self.entries],
            "batch_size": self.plan.batch_size,
            "max_length": self.max_length,
            "padding": self.side,
            "generate": self.generate,
            "sites": [str(site) for site in self.context.sites],
            "sample": self.context.share,
            "taps_checked": True,
            "corpus": self.corpus.name,
            **self.model.settings(),
            **({"batches": [self.batches.start, self.batches.stop]} if self.batches is not None else {}),
            **({} if self.stop_after is None else {"stop_after": self.stop_after}),
            **({} if self._intervention is None else {"intervention": self._intervention}),
        }

    def _begin(self) -> Run:
        if self.before is not None:
            reopen(self.store, self.before.run)
            return self.store.run(self.name)
        self._bytes_before = bytes_before(self.store)
        run = self.store.begin_run(
            name=self.name,
            model=self.model.name,
            revision=self.model.revision,
            architecture=self.model.anatomy.architecture,
            settings=self._settings(),
            versions=library_versions(),
            seed=self.seed,
            corpus_fingerprint=self.facts.fingerprint,
            anatomy=self.model.anatomy.facts(),
            **({} if self._intervention is None else {"intervention": self._intervention}),
        )
        self.store.add_layers(run, [self._layer_row(s) for s in self.context.anatomy.sublayers])
        return run

    def _layer_row(self, s: Sublayer) -> dict[str, Any]:
        columns = ("layer", "block", "stack", "kind", "n_experts", "top_k", "n_shared", "n_null", "d_expert")
        bound = self.context.rules.get((s.layer, s.block))
        return {column: getattr(s, column) for column in columns} | {
            "routing_rule": json.dumps(bound.rule.as_json()) if bound else None
        }

    def _end(self, run: Run, seconds: float, failure: BaseException | None) -> None:
        stopped = reason_of(failure)
        expectations = [
            Expectation(
                "documents",
                self.facts.documents,
                "SELECT count(DISTINCT document_id) FROM sequences WHERE run_id = $run",
                problem=f"recording stopped early ({stopped})" if stopped else None,
            ),
            *(e for probe in self.probes for e in probe.expectations(self.tokens, self.sequences)),
        ]
        summary = {
            "tokens": self.tokens,
            "generated_tokens": self.generated,
            "sequences": self.sequences,
            "documents": self.facts.documents,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(self.tokens / max(seconds, 1e-9), 1),
            "split_documents": self.plan.split_documents,
            "single_token_sequences": self.plan.single_tokens,
            "skipped_records": self.facts.skipped,
            "first_skipped": self.facts.first_skipped,
            "stopped": stopped,
            "left_out": self.left_out,
            **({"plan_batches": self.walk.length} if self.walk is not None else {}),
            "resumed_at_batch": self.before.batches if self.before else None,
            **({"progress": self._progress(seconds)} if stopped else {}),
            **{key: value for probe in self.probes for key, value in probe.summary().items()},
        }
        failed = failure is not None and not isinstance(failure, KeyboardInterrupt)
        end_run(self.store, run, expectations, summary, failed=failed)
        note_costs(self.store, run.run_id, planned=self.planned, seconds=seconds, before=self._bytes_before)
