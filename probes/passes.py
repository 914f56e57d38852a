"""The forward passes of a recording: each batch runs under the taps, and what they keep goes to the host step by step.

A step is one forward pass: the prefill of a batch, or the pass that feeds one generated token of every sequence.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from moescope.core.errors import RunError
from moescope.core.sites import Site
from moescope.probes.batches import Batch, Side
from moescope.probes.copy_out import CopyOut
from moescope.probes.forward import logits_of, to_device
from moescope.probes.generation import continue_greedily, end_ids, ends_sequence
from moescope.probes.likelihood import most_likely, token_nll
from moescope.probes.live_model import LiveModel
from moescope.probes.probe import HostBatch, Probe, ProbeContext
from moescope.probes.stopping import run_until
from moescope.probes.taps import tapped
from moescope.store.writer import BatchRecords

_OUTPUTS, _FED = "outputs", "fed"


@dataclass
class _Step:
    """One forward pass while it runs."""

    phase: str
    ids: Int[torch.Tensor, "row position"]
    mask: Bool[torch.Tensor, "row position"]
    nll: Float[torch.Tensor, "row position"] | None = None
    spans: list[tuple[int, int]] | None = None
    kept: dict[Any, dict[str, torch.Tensor]] = field(default_factory=dict)
    fired: Counter[Site] = field(default_factory=Counter)
    _masks: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    def mask_on(self, device: torch.device) -> Bool[torch.Tensor, "row position"]:
        """The mask on the device where a layer runs."""
        if device not in self._masks:
            self._masks[device] = self.mask.to(device, non_blocking=True)
        return self._masks[device]


@dataclass
class BatchSteps:
    """A batch that has run, on the host.

    Attributes:
        batch: its sequences.
        promised: tokens generated for each sequence as `generate` tells it, whatever steps were seen.
        steps: phase, mask, ids and arrays of each forward pass, in order.
    """

    batch: Batch
    promised: NDArray[np.int64]
    steps: list[tuple[str, NDArray[np.bool_], NDArray[np.int64], dict[Any, Any]]]

    @property
    def generated(self) -> NDArray[np.int64]:
        """Tokens of each sequence that decode steps fed."""
        fed = np.zeros(len(self.batch.sequences), np.int64)
        for phase, mask, _, _ in self.steps:
            fed += mask.sum(1) if phase == "decode" else 0
        return fed

    def host_batches(self, first_token: int) -> Iterator[HostBatch]:
        """The steps that have real tokens, numbered from `first_token` on: sequence by sequence, prompt before answer."""
        lengths, generated = self.batch.lengths, self.generated
        whole = lengths + generated
        starts = first_token + whole.cumsum() - whole
        before = np.zeros_like(lengths)
        for phase, mask, ids, arrays in self.steps:
            outputs = arrays.pop(_OUTPUTS)
            if mask.any():
                yield HostBatch(self.batch, mask, ids.ravel(), arrays, outputs, phase, starts, before, generated)
            before = before + mask.sum(1)


class Passes:
    """Runs batches under the taps of some probes.

    Args:
        model: what runs.
        probes: whose sites are tapped.
        context: takes the problems that are seen on the way.
        generate: tokens to continue each sequence by.
        side: where batches are padded.
        stop_after: the last block that each pass runs; None for whole passes. Without logits there is neither NLL nor
            prediction.
    """

    def __init__(
        self,
        model: LiveModel,
        probes: Sequence[Probe],
        context: ProbeContext,
        *,
        generate: int,
        side: Side,
        stop_after: int | None = None,
    ) -> None:
        self.model, self.probes, self.context = model, probes, context
        self.generate, self.side, self.stop_after = generate, side, stop_after
        self.sites: dict[Site, list[Probe]] = {}
        for probe in probes:
            for site in probe.sites(model.anatomy):
                self.sites.setdefault(site, []).append(probe)
        self._copies = CopyOut()
        self._ends = torch.tensor(end_ids(model), dtype=torch.int64, device=model.device)
        self._thread: int | None = None
        self._step: _Step | None = None
        self._done: list[tuple[str, Callable[[], dict[Any, Any]]]] = []
        self._alive: torch.Tensor | None = None
        self._last: torch.Tensor | None = None
        self._passes: Counter[str] = Counter()
        self._silent: dict[Site, Counter[str]] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Put the taps in place for as long as the context lasts."""
        self._thread = threading.get_ident()
        with torch.no_grad(), tapped(self.model.module, self.model.anatomy, list(self.sites), self._receive):
            yield

    def run(self, batch: Batch) -> Callable[[], BatchSteps]:
        """Run one batch; gives a function that waits for the copies, to be called on another thread."""
        self._done = []
        on_device = to_device(batch, self.model, side=self.side)
        try:
            if self.generate:
                self._alive = torch.ones(len(on_device.ids), dtype=torch.bool, device=on_device.ids.device)
                promised = continue_greedily(
                    self.model,
                    on_device,
                    self.generate,
                    before=lambda ids: self._enter(batch, ids, on_device.mask),
                    after=self._leave,
                )
            else:
                promised = torch.zeros(len(on_device.ids), dtype=torch.int64)
                self._enter(batch, on_device.ids, on_device.mask)
                if self.stop_after is None:
                    self._leave(logits_of(self.model, on_device))
                else:
                    run_until(self.model, on_device, self.stop_after)
                    self._leave(None)
        finally:
            self._step = self._alive = self._last = None
        counted = self._copies.begin({"promised": {"tokens": promised}})
        done = self._done

        def finish() -> BatchSteps:
            steps = []
            for phase, copied in done:
                arrays = copied()
                fed = arrays.pop(_FED)
                steps.append((phase, fed["mask"], fed["ids"], arrays))
            return BatchSteps(batch, counted()["promised"]["tokens"].astype(np.int64), steps)

        return finish

    def report_silence(self) -> None:
        """Tell of every site whose tap did not fire in some forward pass: the ledger shows the gap, this says why."""
        for site, passes in self._silent.items():
            where = " and ".join(f"{n:,} of {self._passes[phase]:,} {phase} passes" for phase, n in passes.items())
            self.context.report(
                site,
                f"the tap did not fire in {where}: the model ran that module another way there, or not at all; "
                "run `moescope doctor` on this model",
            )

    def _enter(self, batch: Batch, ids: torch.Tensor, mask: torch.Tensor) -> None:
        """A forward pass begins."""
        self._step = self._answer_step(ids) if self._done else self._text_step(batch, ids, mask)
        for probe in self.probes:
            probe.enter(batch, step=len(self._done), side=self.side)

    def _text_step(self, batch: Batch, ids: torch.Tensor, mask: torch.Tensor) -> _Step:
        # Losses of padding would be a third of the work on a CPU; elsewhere one long call beats many short ones.
        spans = batch.spans(side=self.side) if ids.device.type == "cpu" else None
        return _Step("prefill", ids, mask, spans=spans)

    def _answer_step(self, ids: torch.Tensor) -> _Step:
        if ids.shape[1] != 1 or self._alive is None or self._last is None:
            raise RunError(
                "the model's generate runs passes that cannot be told apart",
                expected="one token of every sequence in each pass after the prompt's",
                found=f"a pass over {ids.shape[1]} tokens",
                fix="record without generate (--generate)",
            )
        nll = F.cross_entropy(self._last, ids[:, 0].to(self._last.device), reduction="none")
        # Where `generate` looks a pass late whether all have ended, it runs one pass too many.
        alive = self._alive if len(self._done) <= self.generate else torch.zeros_like(self._alive)
        return _Step("decode", ids, alive.unsqueeze(1), nll.unsqueeze(1))

    def _leave(self, logits: torch.Tensor | None) -> None:
        """A forward pass is over; without logits where it was stopped on the way."""
        step = self._step
        assert step is not None
        self._step = None
        step.kept[_OUTPUTS] = {} if logits is None else self._predictions(step, logits)
        if logits is not None and self.generate:
            self._last = logits[:, -1].to(torch.float32, copy=True)  # a view would keep every position alive
        if step.phase == "decode" and self._alive is not None:
            self._alive = self._alive & ~ends_sequence(step.ids[:, 0], self._ends.to(step.ids.device))
        step.kept[_FED] = {"mask": step.mask, "ids": step.ids}
        self._done.append((step.phase, self._copies.begin(step.kept)))
        self._passes[step.phase] += 1
        for site in self.sites:
            if site not in step.fired:
                self._silent.setdefault(site, Counter())[step.phase] += 1

    def _predictions(self, step: _Step, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        if step.nll is None:
            nll, predicted = token_nll(logits, step.ids.to(logits.device), spans=step.spans)
        else:
            nll, predicted = step.nll, most_likely(logits[:, -1].float()).unsqueeze(1)
        return {"nll": nll.flatten(), "predicted_id": predicted.flatten()}

    def _receive(self, site: Site, tensors: dict[str, torch.Tensor]) -> None:
        step = self._step
        if step is None or threading.get_ident() != self._thread:
            return  # somebody else is using the model
        step.fired[site] += 1
        if step.fired[site] > 1:
            self.context.report(
                site,
                "the tap fired more than once in a forward pass, and only the last was kept: the model runs this module "
                "several times for one token, which the records cannot hold; leave this site out",
            )
        given = {**tensors, "mask": step.mask_on(next(iter(tensors.values())).device)}
        for probe in self.sites[site]:
            if small := probe.tap(site, given):
                step.kept.setdefault(site, {}).update(small)


def joined(batch: Batch, tokens: int, parts: Sequence[BatchRecords]) -> BatchRecords:
    """The records of a batch of so many tokens from those of its steps: rows in their order, partial sums added up."""
    whole = BatchRecords(batch.number, (batch.sequences[0].sequence_id, len(batch.sequences), tokens))
    for name in dict.fromkeys(name for part in parts for name in part.tables):
        whole.tables[name] = pa.concat_tables([part.tables[name] for part in parts if name in part.tables])
    whole.loads = _folded([partial for part in parts for partial in part.loads])
    whole.experts = _folded([partial for part in parts for partial in part.experts])
    whole.vectors = [vectors for part in parts for vectors in part.vectors]
    return whole


def _folded(partials: list[Any]) -> list[Any]:
    by_key: dict[Any, Any] = {}
    for partial in partials:
        if partial.key in by_key:
            by_key[partial.key].fold(partial)
        else:
            by_key[partial.key] = partial
    return list(by_key.values())
