"""Whether taps leave a model as it was, and whether it can do what a recording asks of it; tried before a run is entered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch

from moescope.core.errors import InputError, MoescopeError, RunError
from moescope.core.probe import probes as probe_registry
from moescope.core.sites import Site
from moescope.probes.batches import Batch, BatchPlan
from moescope.probes.corpus import Corpus
from moescope.probes.forward import DeviceBatch, logits_of, to_device
from moescope.probes.generation import cannot_generate, check_can_generate, continue_greedily
from moescope.probes.live_model import LiveModel
from moescope.probes.probe import Probe, ProbeContext
from moescope.probes.taps import tapped

_ROWS, _LENGTH, _GENERATED = 2, 64, 2
# By how much left padding may change logits, as a share of their norm: in float32 at every position, where it is rounding
# alone; in narrower types at half of them, since rounding there also tips decisions that are nearly ties.
_PADDING_CHANGES = {torch.float32: 1e-3, torch.float64: 1e-3}
_PADDING_CHANGES_NARROW = 0.1


def compare_logits(model: LiveModel, texts: Sequence[str]) -> str:
    """Run texts plain and under every default probe's taps; raises `RunError` unless the logits are bit-identical."""
    probes: list[Probe] = [
        e.function(ProbeContext(model.anatomy, model.tokenizer)) for e in probe_registry if e.default
    ]
    plan = BatchPlan(Corpus.load(list(texts)), model.tokenizer, len(texts), min(_LENGTH, model.context or _LENGTH))
    return check_taps(model, to_device(next(iter(plan)), model), probes)


def check_taps(model: LiveModel, batch: DeviceBatch, probes: Iterable[Probe], *, generate: bool = False) -> str:
    """Run a batch plain and under the taps of some probes, going on by a few tokens where a recording will `generate`.

    Raises:
        RunError: the logits are not bit-identical.
        InputError: a site that the model does not have.
    """
    sites: dict[Site, list[Probe]] = {}
    for probe in probes:
        for site in probe.sites(model.anatomy):
            sites.setdefault(site, []).append(probe)
    mask = batch.mask

    def receive(site: Site, tensors: dict[str, torch.Tensor]) -> None:
        for probe in sites[site]:
            probe.tap(site, {**tensors, "mask": mask.to(next(iter(tensors.values())).device)})

    def enter(ids: torch.Tensor) -> None:
        nonlocal mask
        mask = batch.mask if ids.shape == batch.mask.shape else torch.ones_like(ids, dtype=torch.bool)

    def every_pass() -> list[torch.Tensor]:
        if not generate:
            return [logits_of(model, batch)]
        given: list[torch.Tensor] = []
        continue_greedily(model, batch, _GENERATED, before=enter, after=given.append)
        return given

    with torch.no_grad():
        plain = every_pass()
        with tapped(model.module, model.anatomy, list(sites), receive):
            seen = every_pass()
        if not _identical(plain, seen):
            steady = _identical(plain, every_pass())
            raise RunError(
                "taps change this model's logits" if steady else "the model gives other logits each time it is run",
                found=f"largest difference {max(float((a - b).abs().max()) for a, b in zip(plain, seen, strict=True)):.3g}",
                fix="do not trust records of this model; please report it"
                if steady
                else "make it deterministic (torch.use_deterministic_algorithms, no dropout) and record it again",
            )
    return f"bit-identical over {sum(p.shape[0] * p.shape[1] for p in plain)} positions, {len(sites)} sites tapped"


def check_generation(model: LiveModel, batch: DeviceBatch) -> None:
    """Continue a batch by a few tokens; raises `InputError` with the reason where the model cannot, or has no cache."""
    check_can_generate(model)
    fed: list[torch.Size] = []
    given: list[torch.Size] = []
    try:
        continue_greedily(
            model,
            batch,
            _GENERATED,
            before=lambda ids: fed.append(ids.shape),
            after=lambda logits: given.append(logits.shape),
        )
    except (MoescopeError, torch.OutOfMemoryError):
        raise
    except Exception as refused:  # a model's own generate may raise anything; told as its reason
        text = " ".join(str(refused).split())[:300]
        raise cannot_generate(model, f"its generate fails: {type(refused).__name__}: {text}") from refused
    if not fed or fed[0] != batch.ids.shape or any(shape[1] != 1 for shape in fed[1:]):
        raise cannot_generate(model, "it has no cache: every token runs the whole text again")
    if any(logits[:2] != ids for logits, ids in zip(given, fed, strict=True)):
        raise cannot_generate(model, "while it generates it gives the logits of the last position only")


def check_left_padding(model: LiveModel, batch: Batch) -> None:
    """Raise `InputError` where a text padded at the left gives other logits than the text alone."""
    # As long as can be, from what tokens there are: sparse attention shows only on texts longer than it attends to.
    ids = np.resize(np.concatenate([s.token_ids for s in batch.sequences]), min(_LENGTH, model.context or _LENGTH))
    whole = replace(batch.sequences[0], token_ids=ids)
    half = replace(whole, token_ids=ids[: len(ids) // 2])
    with torch.no_grad():
        padded = logits_of(model, to_device(Batch(0, (whole, half), 0), model, side="left"))[1, -len(half.token_ids) :]
        alone = logits_of(model, to_device(Batch(0, (half,), 0), model))[0]
    changes = (padded - alone).float().norm(dim=-1) / alone.float().norm(dim=-1)
    exact = alone.dtype in _PADDING_CHANGES
    most = _PADDING_CHANGES.get(alone.dtype, _PADDING_CHANGES_NARROW)
    change = float(changes.nan_to_num().max() if exact else changes.nanmedian())
    if change > most:
        raise InputError(
            f"{model.name} gives other logits for texts padded at the left",
            expected=f"changes of at most {most:g} of their norm at {'every position' if exact else 'half the positions'}",
            found=f"{change:.3g}",
            fix="record with batch_size=1, where nothing is padded, or without generate",
        )


def first_look(batch: Batch) -> Batch:
    """The beginning of a batch, short enough to be run several times."""
    return Batch(0, tuple(replace(s, token_ids=s.token_ids[:_LENGTH]) for s in batch.sequences[:_ROWS]), 0)


def _identical(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """Bit-identical, a NaN being equal to a NaN: what a model cannot compute is the ledger's to tell."""
    return len(first) == len(second) and all(
        a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
        for a, b in zip(first, second, strict=True)
    )
