"""Whether taps leave a model as it was: the check behind `moescope doctor`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moescope.core.errors import RunError
from moescope.core.probe import probes as probe_registry
from moescope.core.sites import Site
from moescope.probes.batches import BatchPlan
from moescope.probes.corpus import Corpus
from moescope.probes.forward import logits_of, to_device
from moescope.probes.live_model import LiveModel
from moescope.probes.probe import Probe, ProbeContext
from moescope.probes.taps import tapped


def compare_logits(model: LiveModel, texts: Sequence[str]) -> str:
    """Run texts plain and under every default probe's taps; raises `RunError` unless the logits are bit-identical."""
    probes: list[Probe] = [
        e.function(ProbeContext(model.anatomy, model.tokenizer)) for e in probe_registry if e.default
    ]
    sites = {site: probe for probe in probes for site in probe.sites(model.anatomy)}
    plan = BatchPlan(Corpus.load(list(texts)), model.tokenizer, len(texts), min(64, model.context or 64))
    batch = to_device(next(iter(plan)), model)

    def receive(site: Site, tensors: dict[str, torch.Tensor]) -> None:
        sites[site].tap(site, {**tensors, "mask": batch.mask})

    with torch.no_grad():
        plain = logits_of(model, batch)
        with tapped(model.module, model.anatomy, list(sites), receive):
            seen = logits_of(model, batch)
    if not torch.equal(plain, seen):
        raise RunError(
            "taps change this model's logits",
            found=f"largest difference {float((plain - seen).abs().max()):.3g}",
            fix="do not trust records of this model; please report it",
        )
    return f"bit-identical over {plain.shape[0] * plain.shape[1]} positions, {len(sites)} sites tapped"
