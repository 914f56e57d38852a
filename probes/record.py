"""`record`: one pass of a corpus through a live model, into a store."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moescope.core.errors import InputError, MoescopeError, RunError
from moescope.core.probe import ProbeEntry
from moescope.core.probe import probes as probe_registry
from moescope.core.sites import Site
from moescope.core.versions import library_versions
from moescope.probes.anatomy import Sublayer
from moescope.probes.batches import Batch, BatchPlan
from moescope.probes.copy_out import CopyOut
from moescope.probes.corpus import Corpus, CorpusFacts
from moescope.probes.forward import logits_of, to_device
from moescope.probes.likelihood import token_nll
from moescope.probes.live_model import LiveModel
from moescope.probes.probe import HostBatch, Probe, ProbeContext
from moescope.probes.progress import RunProgress
from moescope.probes.routing_rule import RoutingRule, find_rules
from moescope.probes.taps import tapped
from moescope.store.coverage import Expectation
from moescope.store.ending import end_run
from moescope.store.run import Run
from moescope.store.store import Store
from moescope.store.writer import BatchRecords, RunWriter

_LEAST_ROOM = 64 << 20
_RULE_ROWS = 2


def record(
    model: LiveModel,
    corpus: Any,
    store: Store,
    *,
    name: str,
    probes: Sequence[str] | None = None,
    batch_size: int = 8,
    max_length: int = 512,
    seed: int = 0,
    progress: bool = True,
) -> Run:
    """Run a corpus through a model and keep what the probes see.

    Args:
        model: from `moescope.load`.
        corpus: a `Corpus`, or anything `Corpus.load` takes.
        store: open for writing.
        name: of the run; unique in the store.
        probes: names of probes; None for the default four, less those that a dense model has no use for.
        batch_size: sequences a forward pass.
        max_length: tokens of the longest sequence; longer documents are split. Never more than the model's context.
        seed: stored with the run; recording itself draws nothing at random.
        progress: draw a progress bar on stderr.

    Returns:
        The run. Its status is `complete` only if every expected event is in the store; otherwise `incomplete`, with the
        gaps in `run.coverage`.

    Raises:
        InputError: a name that is taken, a corpus that cannot be read, a probe that this model has no use for.
        RunError: the disk, the model or the device failed on the way; whole chunks written before stay, status `failed`.
        KeyboardInterrupt: after Ctrl-C, once what was recorded is safe; status `incomplete`.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world."], store, name="first", progress=False)
        ...     run.status
        'complete'
    """
    recording = Recording(
        model,
        Corpus.load(corpus),
        store,
        name=name,
        probes=probes,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
    )
    return recording.run(progress=progress)


class Recording:
    """One call of `record`, from the checks to the ledger. Everything is checked before the run is entered."""

    def __init__(
        self,
        model: LiveModel,
        corpus: Corpus,
        store: Store,
        *,
        name: str,
        probes: Sequence[str] | None,
        batch_size: int,
        max_length: int,
        seed: int,
    ) -> None:
        if batch_size < 1 or max_length < 2:
            raise InputError(
                "batch_size must be at least 1 and max_length at least 2", found=f"{batch_size} and {max_length}"
            )
        if store.read_only:
            raise InputError(f"{store.path} is open for reading only", fix="open it with Store(path)")
        _check_room(store)
        self.model, self.corpus, self.store, self.name, self.seed = model, corpus, store, name, seed
        self.entries = chosen_probes(model, probes)
        self.facts: CorpusFacts = corpus.facts()
        self.max_length = min(max_length, model.context or max_length)
        self.plan = BatchPlan(corpus, model.tokenizer, batch_size, self.max_length, model.anatomy.vocabulary)
        self.context = ProbeContext(model.anatomy, model.tokenizer)
        self.rules = self._find_rules()
        self.context.scores = {place: rule.score for place, rule in self.rules.items() if rule.weights_fit}
        self.context.verified = frozenset(place for place, rule in self.rules.items() if rule.verified)
        self.probes: list[Probe] = [entry.function(self.context) for entry in self.entries]
        self.tokens = self.sequences = 0
        self._copies = CopyOut()

    def run(self, *, progress: bool) -> Run:
        """Record, settle the ledger, give the run its final status."""
        run = self._begin()
        started = time.perf_counter()
        writer = RunWriter(self.store, run.run_id)
        failure: BaseException | None = None
        try:
            self._forward_passes(writer, started, progress=progress)
        except BaseException as error:  # noqa: BLE001  the run must be closed whatever happened; raised again below
            failure = error
        try:
            writer.close()
        except MoescopeError as error:
            failure = error if failure is None or isinstance(failure, MoescopeError) else failure
        for probe in self.probes:
            probe.close()
        self._end(run, time.perf_counter() - started, failure)
        if failure is None:
            return run
        if isinstance(failure, (MoescopeError, KeyboardInterrupt)):
            raise failure
        raise _explained(failure) from failure

    def _forward_passes(self, writer: RunWriter, started: float, *, progress: bool) -> None:
        sites = {
            site: [p for p in self.probes if site in p.sites(self.model.anatomy)]
            for p in self.probes
            for site in p.sites(self.model.anatomy)
        }
        kept: dict[Any, dict[str, torch.Tensor]] = {}
        mask: torch.Tensor

        fired: set[Site] = set()

        def receive(site: Site, tensors: dict[str, torch.Tensor]) -> None:
            if site in fired:
                self.context.report(site, "the tap fired more than once in a forward pass, and only the last was kept")
            fired.add(site)
            for probe in sites[site]:
                small = probe.tap(site, {**tensors, "mask": mask})
                if small:
                    kept.setdefault(site, {}).update(small)

        with (
            RunProgress(f"recording {self.name}", self.facts.characters, shown=progress) as bar,
            torch.no_grad(),
            tapped(self.model.module, self.model.anatomy, list(sites), receive),
        ):
            for batch in self.plan:
                kept.clear()
                fired.clear()
                on_device = to_device(batch, self.model)
                mask = on_device.mask
                logits = logits_of(self.model, on_device)
                nll, predicted = token_nll(logits, on_device.ids)
                del logits
                outputs = {
                    "outputs": {"nll": nll.flatten(), "predicted_id": predicted.flatten()},
                    "mask": {"mask": mask},
                }
                writer.submit(self._rows_later(batch, self._copies.begin({**kept, **outputs})))
                self.tokens, self.sequences = self.tokens + batch.tokens, self.sequences + len(batch.sequences)
                bar.advance_to(batch.characters, self.tokens, time.perf_counter() - started)

    def _rows_later(self, batch: Batch, finish: Callable[[], dict[Any, Any]]) -> Callable[[], BatchRecords]:
        def make_rows() -> BatchRecords:
            arrays = finish()
            outputs, mask = arrays.pop("outputs"), arrays.pop("mask")["mask"]
            records = BatchRecords(batch.number, batch=_batch_row(batch))
            host = HostBatch(batch, mask, arrays, outputs)
            for probe in self.probes:
                probe.rows(host, records)
            return records

        return make_rows

    def _begin(self) -> Run:
        settings = {
            "probes": [e.name for e in self.entries],
            "batch_size": self.plan.batch_size,
            "max_length": self.max_length,
            "corpus": self.corpus.name,
            **self.model.settings(),
        }
        run = self.store.begin_run(
            name=self.name,
            model=self.model.name,
            revision=self.model.revision,
            architecture=self.model.anatomy.architecture,
            settings=settings,
            versions=library_versions(),
            seed=self.seed,
            corpus_fingerprint=self.facts.fingerprint,
            anatomy=self.model.anatomy.facts(),
        )
        self.store.add_layers(run, [self._layer_row(s) for s in self.model.anatomy.sublayers])
        return run

    def _layer_row(self, s: Sublayer) -> dict[str, Any]:
        columns = ("layer", "block", "stack", "kind", "n_experts", "top_k", "n_shared", "n_null", "d_expert")
        rule = self.rules.get((s.layer, s.block))
        return {column: getattr(s, column) for column in columns} | {
            "routing_rule": json.dumps(rule.as_json()) if rule else None
        }

    def _end(self, run: Run, seconds: float, failure: BaseException | None) -> None:
        stopped = _reason(failure)
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
            "sequences": self.sequences,
            "documents": self.facts.documents,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(self.tokens / max(seconds, 1e-9), 1),
            "split_documents": self.plan.split_documents,
            "single_token_sequences": self.plan.single_tokens,
            "skipped_records": self.facts.skipped,
            "first_skipped": self.facts.first_skipped,
            "stopped": stopped,
        }
        failed = failure is not None and not isinstance(failure, KeyboardInterrupt)
        end_run(self.store, run, expectations, summary, failed=failed)

    def _find_rules(self) -> dict[tuple[int, str], RoutingRule]:
        """Hold the known rules against real decisions on the first sequences of the corpus."""
        first = next(iter(self.plan), None)
        if first is None:
            raise InputError(
                f"no text of {self.corpus.name} gives a token", fix="check that the tokenizer belongs to the model"
            )
        if not any(entry.name == "routing" for entry in self.entries):
            return {}
        try:
            return find_rules(self.model, Batch(0, first.sequences[:_RULE_ROWS], 0, 0))
        except MoescopeError:
            raise
        except Exception as failure:
            raise _explained(failure) from failure


def chosen_probes(model: LiveModel, names: Sequence[str] | None) -> list[ProbeEntry]:
    """The probes a run records: those named, or the default ones that this model has a use for."""
    if names is None:
        entries = [entry for entry in probe_registry if entry.default]
    else:
        entries = [probe_registry[name] for name in dict.fromkeys(["tokens", *names])]
    if model.anatomy.moe:
        return entries
    useless = [e.name for e in entries if e.name in ("routing", "experts")]
    if names is not None and useless:
        raise InputError(
            f"{model.name} is dense: it has no routers or experts",
            found=f"probes {', '.join(useless)}",
            fix="leave them out, or leave the choice of probes to moescope",
        )
    return [e for e in entries if e.name not in useless]


def _batch_row(batch: Batch) -> tuple[int, int, int]:
    return batch.sequences[0].sequence_id, len(batch.sequences), batch.tokens


def _check_room(store: Store) -> None:
    free = shutil.disk_usage(store.path.parent).free
    if free < _LEAST_ROOM:
        raise RunError(
            f"there is no room on the disk of {store.path}",
            expected=f"at least {_LEAST_ROOM >> 20} MiB",
            found=f"{free / 2**20:.0f} MiB",
            fix="free some space, or put the store elsewhere",
        )


def _reason(failure: BaseException | None) -> str | None:
    if failure is None:
        return None
    return "interrupted" if isinstance(failure, KeyboardInterrupt) else f"{type(failure).__name__}: {failure}"


def _explained(failure: BaseException) -> RunError:
    text = " ".join(str(failure).split())[:400]
    if isinstance(failure, torch.OutOfMemoryError) or "out of memory" in text or isinstance(failure, MemoryError):
        return RunError(
            "the device ran out of memory",
            found=text,
            fix="lower batch_size or max_length; chunks written before are whole",
        )
    return RunError(
        "the model failed on the way",
        found=f"{type(failure).__name__}: {text}",
        fix="chunks written before are whole; see the cause above with --debug",
    )
