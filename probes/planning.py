"""`plan`: what a recording will cost in bytes, time and memory, before it is begun."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moescope.core.bar import stages
from moescope.core.errors import InputError, MoescopeError, RunError
from moescope.core.sites import Site
from moescope.probes.batches import Batch
from moescope.probes.claim import claimed
from moescope.probes.corpus import Corpus
from moescope.probes.corpus_counts import CorpusCounts, count_tokens
from moescope.probes.live_model import LiveModel
from moescope.probes.measured_pass import measure, places
from moescope.probes.peak_memory import free_device, free_host, resident
from moescope.probes.plan import Plan
from moescope.probes.plan_budget import Choice, read_bytes, within, written_bytes
from moescope.probes.probe_costs import probe_seconds, vector_shapes
from moescope.probes.recording import Recording
from moescope.probes.run_estimate import RunEstimate
from moescope.probes.selfcheck import first_look
from moescope.store.measured_bytes import measured_floats
from moescope.store.store import Store

# While a run is written, its log and what a checkpoint moves lie in the store's folder besides.
_SPARE = 64 << 20
_WITHOUT_RUNS = 2 << 20


def plan(
    model: LiveModel,
    corpus: Any,
    *,
    probes: Sequence[str] | None = None,
    sites: Sequence[str | Site] = (),
    sample: float = 1.0,
    generate: int = 0,
    batch_size: int = 8,
    max_length: int = 512,
    padding: str | None = None,
    seed: int = 0,
    budget: str | int | None = None,
    store: str | Path = "runs.duckdb",
    progress: bool = True,
) -> Plan:
    """Say what a recording will cost, from size formulas and a short measured pass. No store of yours is touched.

    Args:
        model: from `moescope.load`.
        corpus: as `record` takes it.
        probes, sites, sample, generate, batch_size, max_length, padding, seed: as `record` takes them.
        budget: bytes that the run may take on disk: `"2GB"`, `"500 MiB"`, or a number. What does not fit is left out: first
            vectors of some of the tokens, then the dearest probe; the plan says what is lost.
        store: where the run would be recorded, to see how much room there is, and whether it would be the first there. It is
            neither opened nor made.
        progress: say what is being done, on stderr or in the notebook.

    Returns:
        The plan: `plan.bytes`, `.seconds`, `.memory_bytes`, and `.df()` for the part of each probe.

    Raises:
        InputError: what `record` refuses; a run that does not fit the disk or the memory that is free (with what would); a
            budget that not even the tokens alone fit.
        RunError: taps change this model's logits, or it fails on a text.

    Example:
        >>> import moescope as ms
        >>> ms.plan(ms.load("demo"), ["Hello world."], progress=False).tokens
        7
    """
    limit = None if budget is None else read_bytes(budget)
    free_disk = _free_disk(Path(store).parent)
    with stages("planning", shown=progress) as say, tempfile.TemporaryDirectory() as scratch:
        say("checking the model")
        with Store(Path(scratch) / "plan.duckdb") as thrown_away:
            recording = Recording(
                model,
                Corpus.load(corpus),
                thrown_away,
                name="plan",
                probes=probes,
                sites=sites,
                sample=sample,
                generate=generate,
                batch_size=batch_size,
                max_length=max_length,
                padding=padding,
                seed=seed,
            )
            say("counting tokens")
            counts = count_tokens(recording.plan)
            with claimed(model.module, "a plan"), _explained():
                say("running a few batches")
                found = measure(recording, counts.seen)
                say("running each probe by itself")
                shares = probe_seconds(recording, _middle(counts))
                vectors = vector_shapes(recording, first_look(counts.seen[0]))
        estimate = RunEstimate(
            recording, counts, found, shares, vectors, measured_floats(found.tables), first=not _has_runs(Path(store))
        )
    names = [entry.name for entry in recording.entries]
    choice = Choice(tuple(names), sample)
    if limit is not None:
        choice = within(limit, names, sample, estimate.at_most)
    made = estimate.plan(choice, limit)
    _check_disk(made, free_disk, estimate)
    _check_memory(made, model)
    return made


def _middle(counts: CorpusCounts) -> Batch:
    ordered = sorted(counts.seen, key=places)
    return ordered[len(ordered) // 2]


def _has_runs(store: Path) -> bool:
    """Whether a store is there that is larger than one without a run."""
    return store.is_file() and store.stat().st_size > _WITHOUT_RUNS


def _free_disk(folder: Path) -> int:
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}", fix=f"mkdir -p {folder}")
    return shutil.disk_usage(folder).free


def _check_disk(made: Plan, free: int, estimate: RunEstimate) -> None:
    needed = made.bytes + _SPARE
    if needed <= free:
        return
    try:
        kept = within(free - _SPARE, made.probes, made.sample, estimate.at_most)
        would = f"budget={written_bytes(free - _SPARE)} (--budget) would fit: {'; '.join(kept.lost)}"
    except InputError:
        would = "record fewer texts, or put the store on another disk"
    raise InputError(
        "the run does not fit the disk",
        expected=f"{written_bytes(needed)} of free space, {written_bytes(_SPARE)} of it for the time of writing",
        found=f"{written_bytes(free)}",
        fix=would,
    )


def _check_memory(made: Plan, model: LiveModel) -> None:
    devices = [torch.device(name) for name in dict.fromkeys(model.devices)]
    added = made.memory_bytes - resident()
    for where, needed, free in (
        ("memory", added, free_host()),
        ("memory of the device", made.device_bytes, free_device(devices)),
    ):
        if free is not None and needed > free:
            raise InputError(
                f"the run does not fit the {where}",
                expected=f"{written_bytes(needed)}",
                found=f"{written_bytes(free)} free",
                fix="lower batch_size (--batch-size) or max_length (--max-length)",
            )


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except MoescopeError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as full:
        raise InputError(
            "a batch does not fit the memory",
            found=" ".join(str(full).split())[:200],
            fix="lower batch_size (--batch-size) or max_length (--max-length)",
        ) from full
    except Exception as failure:  # whatever a model may raise, told as its failure
        raise RunError(
            "the model failed on a batch",
            found=f"{type(failure).__name__}: {' '.join(str(failure).split())[:400]}",
            fix="see the cause above with --debug; a recording would fail in the same way",
        ) from failure
