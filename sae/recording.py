"""Recording vectors to train on: a budget of tokens, no block more than is needed, and room on the disk before it begins."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from moescope.core.errors import InputError, RunError
from moescope.core.site_names import read_site
from moescope.core.sites import Site
from moescope.probes.batches import Batch, BatchPlan
from moescope.probes.choices import check_sizes, longest
from moescope.probes.corpus import Corpus
from moescope.probes.corpus_files import BadRecord, Record
from moescope.probes.forward import logits_of, to_device
from moescope.probes.live_model import LiveModel
from moescope.probes.plan_budget import read_bytes, written_bytes
from moescope.probes.record import record
from moescope.probes.selfcheck import first_look
from moescope.probes.stopping import run_until, why_no_stop
from moescope.sae.data.live import SiteVectors, site_vectors
from moescope.store.run import Run
from moescope.store.store import Store
from moescope.store.vector_shards import vectors_folder

_COUNTING = 256  # sequences at a time while a corpus is counted
_ROW_BYTES = 20  # of a token's row in the tables, rounded up
_SPARE = 64 << 20  # never taken from a disk
_TRIAL_SECONDS, _TRIAL_BATCHES = 3.0, 16


@dataclass(frozen=True)
class SiteCost:
    """What one site takes.

    Attributes:
        site: its name.
        width: components of a vector.
        rows: vectors a token: one, or one for each slot inside experts.
        dtype: type of the components, the model's own.
        bytes_per_token: of the tokens that are kept.
    """

    site: str
    width: int
    rows: float
    dtype: str
    bytes_per_token: float


@dataclass(frozen=True)
class VectorPlan:
    """What a recording of vectors will take.

    Attributes:
        documents, left: of the corpus: recorded, and left over where the budget ends before it.
        tokens, sequences: of those recorded.
        sample: share of the tokens whose vectors are kept.
        stop_after: the last block that passes run; None where they run to their end.
        sites: cost of each.
        vectors: how many will be kept, all sites together, about.
        bytes: on disk, about.
        free: bytes that the disk has now.
        seconds: of the passes, by a short trial; None where none was made.
    """

    documents: int
    left: int
    tokens: int
    sequences: int
    sample: float
    stop_after: int | None
    sites: tuple[SiteCost, ...]
    vectors: int
    bytes: int
    free: int
    seconds: float | None = None

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def plan_vectors(
    model: LiveModel,
    corpus: Any,
    store: Path,
    *,
    sites: Sequence[str | Site] | str | Site,
    tokens: int | None = None,
    sample: float = 1.0,
    batch_size: int = 8,
    max_length: int = 512,
    budget: str | int | None = None,
    trial: bool = False,
) -> VectorPlan:
    """What `record_vectors` would record with the same arguments, counted over the corpus; nothing is written.

    Args:
        model, corpus, sites, tokens, sample, batch_size, max_length, budget: as for `record_vectors`.
        store: where the store lies or will lie.
        trial: run some batches, for at most about three seconds, to tell how long it would take.

    Raises:
        InputError: what `record_vectors` refuses.
    """
    return _planned(
        model,
        Corpus.load(corpus),
        store,
        sites=_sites(model, sites),
        tokens=tokens,
        sample=sample,
        batch_size=batch_size,
        max_length=max_length,
        budget=budget,
        trial=trial,
    )


def record_vectors(
    model: LiveModel,
    corpus: Any,
    store: Store,
    *,
    sites: Sequence[str | Site] | str | Site,
    name: str | None = None,
    tokens: int | None = None,
    sample: float = 1.0,
    batch_size: int = 8,
    max_length: int = 512,
    budget: str | int | None = None,
    seed: int = 0,
    progress: bool = True,
    resume: bool = False,
) -> Run:
    """Record the vectors of a corpus at some sites, for autoencoders to be trained and judged on.

    The run has the probes `tokens` and `activations`. Passes stop after the last block that a site needs, where the model can
    be stopped, so there is no NLL. Every vector is kept in the type in which the model computed it.

    Args:
        model: from `moescope.load`.
        corpus: a `Corpus`, or anything `Corpus.load` takes.
        store: open for writing.
        sites: one or several; each vector of one forward pass is kept at all of them.
        name: of the run; None for the model's name with `-vectors`, numbered.
        tokens: at most so many: the recording ends with the last document that fits. None for the whole corpus.
        sample: share of these tokens whose vectors are kept: by hash(seed, sequence, position).
        batch_size: sequences a pass. On a CPU, 1 is fastest for documents of a few hundred tokens: nothing is padded.
        max_length: tokens of the longest sequence; longer documents are split.
        budget: bytes on disk, as `"2GB"` or a number: the recording ends earlier where it would take more.
        seed: stored with the run.
        progress: draw a progress bar on stderr.
        resume: go on with the run of this name where it was stopped.

    Returns:
        The run; `run.info["settings"]["corpus"]` says how many documents were left over.

    Raises:
        InputError: no such site, a name that is taken, a budget that not even the first document fits.
        RunError: the disk has not the room (it says how much is needed and how much is free), or whatever `moescope.record`
            raises.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> texts = ["One text of a few words.", "Another text.", "And a third one."]
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = record_vectors(
        ...         ms.load("demo"), texts, store, sites="blocks.2.hook_resid_post", tokens=15, progress=False
        ...     )
        ...     run.status, run.info["settings"]["stop_after"], run.info["settings"]["corpus"]
        ('complete', 2, 'list, the first 2 of 3 documents')
    """
    whole, read = Corpus.load(corpus), _sites(model, sites)
    if resume and name is None:
        raise InputError("which run is to go on?", fix="name it (--name)")
    plan = _planned(
        model,
        whole,
        store.path,
        sites=read,
        tokens=tokens,
        sample=sample,
        batch_size=batch_size,
        max_length=max_length,
        budget=budget,
        trial=False,
    )
    chosen = name or _free_name(store, model)
    _check_room(plan, store, chosen)
    return record(
        model,
        whole if not plan.left else _first_documents(whole, plan),
        store,
        name=chosen,
        probes=("tokens", "activations"),
        sites=read,
        sample=sample,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
        resume=resume,
        stop_after=plan.stop_after,
        progress=progress,
    )


def _sites(model: LiveModel, sites: Sequence[str | Site] | str | Site) -> list[Site]:
    given = [sites] if isinstance(sites, (str, Site)) else list(sites)
    if not given:
        raise InputError("vectors are recorded at sites, and none was named", fix="name one: blocks.3.hook_resid_post")
    return list(dict.fromkeys(read_site(site, model.anatomy) for site in given))


def _planned(
    model: LiveModel,
    corpus: Corpus,
    store: Path,
    *,
    sites: Sequence[Site],
    tokens: int | None,
    sample: float,
    batch_size: int,
    max_length: int,
    budget: str | int | None,
    trial: bool,
) -> VectorPlan:
    check_sizes(batch_size, max_length, 0, sample, None)
    if tokens is not None and tokens < 1:
        raise InputError("tokens is how many to record", expected="1 or more", found=str(tokens))
    length = longest(model, max_length, 0)
    plan = BatchPlan(corpus, model.tokenizer, _COUNTING, length, model.anatomy.vocabulary)
    costs = _costs(model, plan, sites)
    facts = corpus.facts()
    each = sample * sum(cost.bytes_per_token for cost in costs) + _ROW_BYTES
    most = tokens
    if budget is not None:
        # A token stands for some characters, whose text is kept too.
        fitting = int(read_bytes(budget) / (each + 2 * _characters(plan)))
        most = fitting if most is None else min(most, fitting)
    documents, counted, sequences, characters = _fitting(plan, most, budget)
    stop = None if why_no_stop(model) else max(site.layer for site in sites)
    rows = sum(cost.rows for cost in costs)
    small = BatchPlan(corpus, model.tokenizer, batch_size, length, model.anatomy.vocabulary)
    return VectorPlan(
        documents,
        facts.documents - documents,
        counted,
        sequences,
        sample,
        stop,
        tuple(costs),
        round(counted * sample * rows),
        round(counted * each) + characters,
        shutil.disk_usage(_folder(store)).free,
        _seconds(model, small, stop, counted) if trial else None,
    )


def _costs(model: LiveModel, plan: BatchPlan, sites: Sequence[Site]) -> list[SiteCost]:
    """What each site keeps of a token, seen on the beginning of the first texts."""
    first = next(iter(plan), None)
    if first is None:
        raise InputError(
            f"no text of {plan.corpus.name} gives a token", fix="check that the tokenizer belongs to the model"
        )
    seen = site_vectors(model, first_look(first), sites)
    return [_cost(site, seen[site], len(seen)) for site in sites]


def _cost(site: Site, found: SiteVectors, tokens: int) -> SiteCost:
    rows, width = len(found.vectors) / tokens, found.vectors.shape[1]
    beside = 8 if found.expert is None else 12  # the row's token, and its expert
    size = rows * (width * found.vectors.element_size() + beside)
    return SiteCost(str(site), width, rows, str(found.vectors.dtype).removeprefix("torch."), size)


def _fitting(plan: BatchPlan, most: int | None, budget: str | int | None) -> tuple[int, int, int, int]:
    """Documents that fit, their tokens, sequences and characters: whole documents, from the first on."""
    documents = tokens = sequences = characters = 0
    for length, parts, size in _documents(plan):
        if most is not None and tokens + length > most:
            break
        documents, tokens, sequences, characters = documents + 1, tokens + length, sequences + parts, characters + size
    else:
        return documents, tokens, sequences, characters
    if not documents:
        raise InputError(
            f"not even the first document of {plan.corpus.name} fits",
            expected=f"at least {length:,} tokens",
            found=f"{most:,} tokens" + (f" in a budget of {budget}" if budget is not None else ""),
            fix="raise tokens (--tokens) or the budget, or keep vectors of fewer of them (--sample)",
        )
    return documents, tokens, sequences, characters


def _documents(plan: BatchPlan) -> Iterator[tuple[int, int, int]]:
    """Tokens, parts and characters of each document."""
    current, tokens, parts, characters = -1, 0, 0, 0
    for batch in plan:
        for sequence in batch.sequences:
            if sequence.document_id != current and current >= 0:
                yield tokens, parts, characters
                tokens = parts = characters = 0
            current = sequence.document_id
            tokens, parts = tokens + len(sequence.token_ids), parts + 1
            characters += len(sequence.text)
    if current >= 0:
        yield tokens, parts, characters


def _characters(plan: BatchPlan) -> float:
    """Characters a token, over the first texts."""
    first = next(iter(plan))
    return sum(len(s.text) for s in first.sequences) / first.tokens


def _first_documents(corpus: Corpus, plan: VectorPlan) -> Corpus:
    """A corpus of its first documents alone."""
    everything = plan.documents + plan.left

    def records() -> Iterator[Record | BadRecord]:
        taken = 0
        for document in corpus.documents():
            if isinstance(document, BadRecord):
                yield document
                continue
            if taken == plan.documents:
                return
            fields: dict[str, Any] = dict(document.metadata)
            fields |= {"text": document.text, "label": document.label, "source": document.source}
            yield Record(
                document.source or "", fields | ({"token_ids": document.token_ids} if document.token_ids else {})
            )
            taken += 1

    name = f"{corpus.name}, the first {plan.documents:,} of {everything:,} documents"
    return Corpus(records, name=name, skip_bad_lines=True)


def _seconds(model: LiveModel, plan: BatchPlan, stop: int | None, tokens: int) -> float:
    """Seconds that the passes would take, from some of the first batches; the very first warms up and is not counted."""
    ran, spent = 0, 0.0
    for number, batch in enumerate(islice(plan, _TRIAL_BATCHES)):
        started = time.perf_counter()
        _pass(model, batch, stop)
        if number or batch.tokens >= tokens:
            ran, spent = ran + batch.tokens, spent + time.perf_counter() - started
        if spent > _TRIAL_SECONDS:
            break
    return spent / ran * tokens if ran else 0.0


@torch.no_grad()
def _pass(model: LiveModel, batch: Batch, stop: int | None) -> None:
    on_device = to_device(batch, model)
    if stop is None:
        logits_of(model, on_device)
    else:
        run_until(model, on_device, stop)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _check_room(plan: VectorPlan, store: Store, name: str) -> None:
    there = 0
    for run in store.runs():
        if run.name == name:  # one that goes on has some of it already
            there = sum(file.stat().st_size for file in vectors_folder(store.path, run.run_id).rglob("*.safetensors"))
    needed = plan.bytes - there + _SPARE
    if needed > plan.free:
        raise RunError(
            f"there is no room for these vectors on the disk of {store.path}",
            expected=f"{written_bytes(needed)} free for {plan.tokens:,} tokens at {len(plan.sites)} sites",
            found=f"{written_bytes(plan.free)}",
            fix="lower tokens (--tokens), the share of them that is kept (--sample), or give a budget; or put the store on another disk",
        )


def _folder(store: Path) -> Path:
    folder = store.resolve().parent
    if not folder.is_dir():
        raise InputError(f"cannot make a store at {store}", found="no such folder", fix=f"mkdir -p {folder}")
    return folder


def _free_name(store: Store, model: LiveModel) -> str:
    taken = {run.name for run in store.runs()}
    stem = Path(model.name).stem if model.name.endswith(".gguf") else Path(model.name).name
    numbered = (f"{stem}-vectors{'' if n == 1 else f'-{n}'}" for n in range(1, len(taken) + 2))
    return next(name for name in numbered if name not in taken)
