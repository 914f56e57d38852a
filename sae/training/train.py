"""`train`: several autoencoders from one run's vectors, in one pass over them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from moescope.core.errors import InputError, RunError
from moescope.core.site_names import read_site
from moescope.core.sites import Site
from moescope.sae.autoencoder import Autoencoder
from moescope.sae.catalogue import check_sae_names, delete_saes, free_sae_name
from moescope.sae.loading import load_autoencoder
from moescope.sae.saelens import need_saelens
from moescope.sae.training.checkpoints import Checkpoint, Checkpoints
from moescope.sae.training.keeping import Place, keep
from moescope.sae.training.loop import Diverged, Ended, fit
from moescope.sae.training.source import Source, source_of
from moescope.sae.training.specs import SaeSpec
from moescope.sae.training.trainee import Trainee

if TYPE_CHECKING:
    from moescope.store.run import Run
    from moescope.store.store import Store

logger = logging.getLogger(__name__)

_SAMPLE = 16_384
_HELD_OUT = 16_384
_FEWEST = 256
_LARGEST_BATCH, _SMALLEST_BATCH, _STEPS = 4096, 64, 500


def train(
    run: Run,
    store: Store,
    specs: Sequence[SaeSpec | str] | SaeSpec | str,
    *,
    site: str | Site,
    target_site: str | Site | None = None,
    expert: int | None = None,
    head: int | None = None,
    vectors: int | None = None,
    names: Sequence[str] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    device: str = "auto",
    checkpoint_every: int | None = None,
    resume: bool = False,
    progress: bool = True,
    held_out: float = 0.1,
    max_norm_ratio: float | None = None,
    skip_first: int = 1,
) -> list[Autoencoder]:
    """Train autoencoders on the vectors that a run kept at a site: each batch is read once, and each makes a step on it.

    SAELens' own classes compute losses and steps (Adam, gradients clipped to norm 1). Before training, one sample gives the
    scale of the vectors and their geometric median, at which the decoder's bias begins. Afterwards scale and matrix are folded
    into the weights, so that each takes vectors as the model has them, and it is written in SAELens' format beside the store.

    Args:
        run: whose vectors they are.
        store: open for writing; the autoencoders go there.
        specs: what to train, as `SaeSpec` or its text: `"topk:d=4096,k=32"`.
        site: where the vectors were read.
        target_site: for transcoders, what they predict.
        expert: at a site inside experts, the one expert whose vectors to take; None for all.
        head: at a site of heads, the one head whose vectors to take; None for all heads side by side.
        vectors: how many to train on, repeats included; None for every one once.
        names: of the autoencoders; None makes some of form, size and sparsity.
        batch_size: vectors a step; None for 4,096, or fewer where that would leave under 500 steps.
        seed: of the first weights and the order of vectors.
        device: "auto" (CUDA where there is one), or any of torch's.
        checkpoint_every: steps between two checkpoints; None for a tenth of the training.
        resume: go on with the training of these names where it was stopped; from the start where it was not begun. It ends with
            the same weights, to the bit, as one that was never stopped.
        progress: show how it goes, on stderr.
        held_out: share of the documents that training does not see.
        max_norm_ratio: leave out vectors of more than so many times the median norm; None keeps them.
        skip_first: leave out so many first tokens of each sequence, whose massive activations would drown all others.

    Returns:
        The autoencoders as they lie in the store, in the order of `specs`.

    Raises:
        InputError: a spec, name or site that cannot be; too few vectors; transcoders without a target site.
        StoreError: vectors are missing or damaged.
        RunError: a loss, a gradient or a vector was not finite: training is stopped, and what the last checkpoint held is in the
            store, its summary saying so.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written; `resume=True` goes on.

    Example:
        >>> import moescope as ms
        >>> from moescope.sae.training.train import train
        >>> with ms.Store("runs.duckdb") as store:  # doctest: +SKIP
        ...     train(store.run("base"), store, "topk:d=4096,k=32", site="blocks.3.hook_resid_post")
    """
    need_saelens()
    if store.read_only:
        raise InputError(f"{store.path} is open for reading only", fix="open it with Store(path)")
    work = _prepared(
        run, store, specs, site, target_site, names, vectors, batch_size, expert=expert, head=head, held_out=held_out,
        max_norm_ratio=max_norm_ratio, skip_first=skip_first,
    )  # fmt: skip
    plan, source, where = work.plan, work.source, _device(device)
    settings = {**source.facts(), **plan, "seed": seed, "notes": source.notes}
    place = Place(run, work.site, work.target, expert, head)
    checkpoints = Checkpoints(store.path, work.names, {**settings, **work.facts(), "run": run.run_id})
    found = checkpoints.newest() if resume else None
    sample, held = source.sample(_SAMPLE), source.held_out(_HELD_OUT)
    trainees = [
        Trainee.begin(
            name, spec, sample, widths=source.widths, steps=plan["steps"], batch_size=plan["batch_size"], seed=seed,
            device=where, metadata=place.metadata(source.facts()),
        )
        for name, spec in zip(work.names, work.specs, strict=True)
    ]  # fmt: skip
    every = max(1, plan["steps"] // 10) if checkpoint_every is None else checkpoint_every or None
    with closing(source.batches(plan["batch_size"], seed)) as batches:
        if found is not None:
            _restore(trainees, found)
            batches.restore(found.data)
        else:
            checkpoints.drop()
        ended = fit(
            trainees, batches, steps=plan["steps"], checkpoints=checkpoints, every=every,
            first=0 if found is None else found.step, seconds=0.0 if found is None else found.seconds, progress=progress,
        )  # fmt: skip
    if ended.interrupted:
        logger.warning("stopped after step %s of %s; go on with resume=True (--resume)", ended.step, plan["steps"])
        raise KeyboardInterrupt
    ended = _back_to_good(trainees, ended, checkpoints)
    _keep_all(store, trainees, place, settings, held, ended)
    checkpoints.drop()
    if ended.diverged is not None:
        raise _stopped(ended.diverged, ended.step, work.names)
    return [load_autoencoder(store, name, device=where) for name in work.names]


def _keep_all(
    store: Store, trainees: Sequence[Trainee], place: Place, settings: dict[str, Any], held: Any, ended: Ended
) -> None:
    """Store every autoencoder, or none: so that a training that goes on finds its names free."""
    kept: list[str] = []
    try:
        for trainee in trainees:
            keep(store, trainee, place, settings, held, ended)
            kept.append(trainee.name)
    except BaseException:
        if kept:
            delete_saes(store, kept)
        raise


def plan_training(
    run: Run,
    store: Store,
    specs: Sequence[SaeSpec | str] | SaeSpec | str,
    *,
    site: str | Site,
    target_site: str | Site | None = None,
    expert: int | None = None,
    head: int | None = None,
    vectors: int | None = None,
    names: Sequence[str] | None = None,
    batch_size: int | None = None,
    held_out: float = 0.1,
    max_norm_ratio: float | None = None,
    skip_first: int = 1,
) -> dict[str, Any]:
    """What `train` would do, by the same arguments: names, vectors, steps and parameters; nothing is written.

    Raises:
        InputError: `train` would refuse it.
    """
    work = _prepared(
        run, store, specs, site, target_site, names, vectors, batch_size, expert=expert, head=head, held_out=held_out,
        max_norm_ratio=max_norm_ratio, skip_first=skip_first,
    )  # fmt: skip
    source, width = work.source, work.source.widths[0]
    out = source.widths[1] or width
    latents = [spec.latents(width) for spec in work.specs]
    return {
        "run": run.name,
        "site": str(work.site),
        "autoencoders": ", ".join(work.names),
        "width": width,
        "latents": ", ".join(f"{count:,}" for count in latents),
        "weights": sum(count * (width + out + 1) + out for count in latents),
        "vectors kept": source.count + source.held_out_count,
        "held out": source.held_out_count,
        **work.plan,
        **({"left out": " ".join(source.notes)} if source.notes else {}),
    }


@dataclass(frozen=True)
class _Work:
    """What is asked for, checked, with the vectors it needs."""

    specs: list[SaeSpec]
    site: Site
    target: Site | None
    source: Source
    names: list[str]
    plan: dict[str, int]

    def facts(self) -> dict[str, Any]:
        """What a training has to have in common with one that it goes on with, besides its settings."""
        sites = [None if site is None else str(site) for site in (self.site, self.target)]
        return {"specs": [spec.as_dict() for spec in self.specs], "sites": sites}


def _prepared(
    run: Run,
    store: Store,
    specs: Sequence[SaeSpec | str] | SaeSpec | str,
    site: str | Site,
    target_site: str | Site | None,
    names: Sequence[str] | None,
    vectors: int | None,
    batch_size: int | None,
    **which: Any,
) -> _Work:
    asked = _specs(specs)
    read, target = read_site(site), None if target_site is None else read_site(target_site)
    _check_kinds(asked, target)
    source = source_of(run, read, target_site=target, **which)
    _check_count(source, run, read)
    chosen = _names(store, asked, names, source.widths[0])
    return _Work(asked, read, target, source, chosen, _planned(source, vectors, batch_size))


def _specs(specs: Sequence[SaeSpec | str] | SaeSpec | str) -> list[SaeSpec]:
    given = [specs] if isinstance(specs, (SaeSpec, str)) else list(specs)
    if not given:
        raise InputError("nothing to train", expected='specs, for instance "topk:d=4096,k=32"')
    return [spec if isinstance(spec, SaeSpec) else SaeSpec.parse(spec) for spec in given]


def _check_kinds(specs: Sequence[SaeSpec], target: Site | None) -> None:
    for spec in specs:
        if spec.is_transcoder and target is None:
            raise InputError(
                f"{spec.architecture} predicts one site from another",
                fix="say which: target_site='blocks.3.hook_mlp_out' (--target-site)",
            )
        if not spec.is_transcoder and target is not None:
            raise InputError(
                f"{spec.architecture} reconstructs its own site, and a target site was given",
                fix="leave target_site out, or train a transcoder",
            )


def _check_count(source: Source, run: Run, site: Site) -> None:
    if source.count < _FEWEST:
        raise InputError(
            f"run {run.name!r} kept too few vectors at {site} to train on",
            expected=f"at least {_FEWEST:,}, after what is held out and left out",
            found=f"{source.count:,}",
            fix="record more text, or a larger share of its tokens",
        )


def _names(store: Store, specs: Sequence[SaeSpec], names: Sequence[str] | None, width: int) -> list[str]:
    if names is None:
        made: list[str] = []
        for spec in specs:
            made.append(free_sae_name(store, spec.name(width), made))
        return made
    if len(names) != len(specs):
        raise InputError("each autoencoder needs a name", expected=f"{len(specs)}", found=f"{len(names)}")
    check_sae_names(store, names)
    return list(names)


def _planned(source: Source, vectors: int | None, batch_size: int | None) -> dict[str, int]:
    """Steps, and vectors a step."""
    for name, value in (("vectors", vectors), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise InputError(f"{name} is a number over 0", found=f"{value}")
    wanted = source.count if vectors is None else vectors
    fitting = 2 ** int(math.log2(max(1, wanted / _STEPS)))
    size = batch_size or min(max(fitting, _SMALLEST_BATCH), _LARGEST_BATCH)
    size = min(size, source.count)
    steps = wanted // size
    if steps < 2:
        raise InputError(
            f"{wanted:,} vectors make {steps} batches of {size:,}", fix="use smaller batches, or train on more vectors"
        )
    return {"steps": steps, "batch_size": size, "vectors": steps * size}


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as refused:
        raise InputError(
            f"there is no device {name!r} here", found=" ".join(str(refused).split())[:200], fix="use cpu, or auto"
        ) from refused
    return name


def _restore(trainees: Sequence[Trainee], found: Checkpoint) -> None:
    for trainee, tensors, facts in zip(trainees, found.tensors, found.facts, strict=True):
        trainee.restore(tensors, facts)


def _back_to_good(trainees: Sequence[Trainee], ended: Ended, checkpoints: Checkpoints) -> Ended:
    """After numbers that are not finite, everything as the last checkpoint has it.

    Raises:
        RunError: there is no checkpoint.
    """
    if ended.diverged is None:
        return ended
    found = checkpoints.newest() if ended.saved is not None else None
    if found is None:
        checkpoints.drop()
        raise _stopped(ended.diverged, None, [t.name for t in trainees])
    _restore(trainees, found)
    return Ended(found.step, found.seconds, ended.diverged, saved=found.step)


def _stopped(diverged: Diverged, kept: int | None, names: Sequence[str]) -> RunError:
    told = f"{', '.join(names)} as they were after step {kept} are in the store" if kept else "nothing of it is kept"
    fix = "train it again under another name with a lower rate (lr=…)"
    if diverged.name is None or "vector" in diverged.what:
        fix = "record the vectors again, in float32 where the model overflows in half precision"
    return RunError(f"training was stopped: {diverged}", found=told, fix=fix)
