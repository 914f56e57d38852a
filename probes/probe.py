"""What a probe is, and what it is given."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.core.sites import Site
from moescope.probes.anatomy import Anatomy, Sublayer
from moescope.probes.batches import Batch, Side
from moescope.probes.routing_rule import BoundRule
from moescope.store.coverage import Expectation
from moescope.store.writer import BatchRecords

Tensors = Mapping[str, torch.Tensor]
Arrays = Mapping[str, NDArray[Any]]
_NUMBER = re.compile(r"-?\d[\d.,]*(?:e[+-]?\d+)?")


@dataclass
class ProbeContext:
    """What every probe of a run shares.

    Attributes:
        anatomy: of the model.
        tokenizer: of the model, None without one.
        rules: (layer, block) → the routing rule found there, verified or not.
        sites, share, seed: of the probe `activations`: where vectors are kept, for which share of the tokens, chosen by
            hash(seed, sequence, position).
        problems: site → why its records are not to be trusted; a probe adds to it with `report`.
    """

    anatomy: Anatomy
    tokenizer: Any = None
    rules: Mapping[tuple[int, str], BoundRule] = field(default_factory=dict)
    sites: tuple[Site, ...] = ()
    share: float = 1.0
    seed: int = 0
    problems: dict[str, str] = field(default_factory=dict)
    _reported: dict[str, dict[str, str]] = field(default_factory=dict, repr=False)

    def report(self, site: Site | str, problem: str) -> None:
        """Note a problem at a site: each once, whatever numbers it tells; the first of a kind stays."""
        kinds = self._reported.setdefault(str(site), {})
        kinds.setdefault(_NUMBER.sub("#", problem), problem)
        self.problems[str(site)] = "; ".join(kinds.values())


@dataclass
class HostBatch:
    """One step of a batch on the host: its prefill, or the pass that fed one generated token of every sequence.

    Attributes:
        batch: its sequences, one a row.
        mask: [row, position] real tokens of this step; in a decode step [row, 1], false for sequences that have ended.
        ids: token ids fed, [row · position].
        kept: site → what the probes' `tap` kept there, as arrays; the probes at one site share the names.
        outputs: `nll` and `predicted_id`, [row · position].
        phase: `prefill` or `decode`.
        starts: run-wide number of the first token of each row's sequence.
        before: how many tokens of each row's sequence earlier steps fed.
        generated: how many tokens the whole batch generated for each row.
    """

    batch: Batch
    mask: NDArray[np.bool_]
    ids: NDArray[np.int64]
    kept: Mapping[Site, Arrays]
    outputs: Arrays
    phase: str
    starts: NDArray[np.int64]
    before: NDArray[np.int64]
    generated: NDArray[np.int64]

    @cached_property
    def real(self) -> NDArray[np.int64]:
        """Which of the row · position places are real tokens, in order."""
        return np.flatnonzero(self.mask)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Real tokens of each row in this step."""
        found: NDArray[np.int64] = self.mask.sum(axis=1, dtype=np.int64)
        return found

    @cached_property
    def row(self) -> NDArray[np.int64]:
        """Row of each real token, in order."""
        return np.repeat(np.arange(len(self.mask)), self.lengths)

    @cached_property
    def position(self) -> NDArray[np.int64]:
        """Place of each real token in its sequence, 0-based."""
        within = np.arange(len(self.row)) - np.repeat(self.lengths.cumsum() - self.lengths, self.lengths)
        found: NDArray[np.int64] = self.before[self.row] + within
        return found

    @cached_property
    def token(self) -> NDArray[np.int64]:
        """Run-wide number of each real token, in order."""
        found: NDArray[np.int64] = self.starts[self.row] + self.position
        return found

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Index into `label_names` of each real token."""
        index = {name: number for number, name in enumerate(self.label_names)}
        return np.repeat([index[s.document.label] for s in self.batch.sequences], self.lengths)

    @cached_property
    def label_names(self) -> list[str | None]:
        """Labels in the batch, in order of appearance."""
        return list(dict.fromkeys(s.document.label for s in self.batch.sequences))


class Probe(ABC):
    """Records one kind of thing at sites during a forward pass, as rows.

    `tap` runs inside the forward pass, on the model's device, and must not read anything back to the host; `mask` among
    its tensors tells real tokens from padding, [row, position], which may be at either side. `rows` runs later, on the
    writing thread, once for every step of a batch that has real tokens.
    """

    def __init__(self, context: ProbeContext) -> None:
        self.context = context

    def enter(self, batch: Batch, *, step: int, side: Side) -> None:  # noqa: B027  most probes need not know
        """A forward pass begins, on the model's thread.

        Step 0 is the prefill of `batch`, padded at `side`; step n feeds the n-th generated token of each sequence. In the
        passes tried before a run, taps are called without it.
        """

    @classmethod
    def no_use(cls, anatomy: Anatomy) -> str | None:
        """Why a model of this anatomy gives the probe nothing to record; None where it does."""
        return None

    @abstractmethod
    def sites(self, anatomy: Anatomy) -> list[Site]:
        """Where the probe wants to be called."""

    @abstractmethod
    def tap(self, site: Site, tensors: Tensors) -> Tensors:
        """Reduce what passes a site to the small tensors worth keeping."""

    @abstractmethod
    def rows(self, host: HostBatch, records: BatchRecords) -> None:
        """Turn what was kept of one step into rows, added to `records`, which hold nothing of this probe yet."""

    @abstractmethod
    def expectations(self, tokens: int, sequences: int) -> list[Expectation]:
        """What so many unmasked tokens, prompts and generated ones together, and sequences must have given."""

    def summary(self) -> dict[str, Any]:
        """Facts of the whole run, for `runs.summary`; asked for once every batch has been turned into rows."""
        return {}

    def state(self) -> dict[str, Any]:
        """What the probe has counted so far, as JSON data, for a run that is stopped and goes on; called after `rows`."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:  # noqa: B027  most probes count nothing across batches
        """Go on from what `state` gave."""

    def close(self) -> None:  # noqa: B027  most probes hold nothing
        """Let go of what the probe holds."""


def no_routers(anatomy: Anatomy) -> str | None:
    """Why a model has no routing to record; None where it has."""
    return None if anatomy.moe else "the model is dense: it has no routers or experts"


def no_inside(anatomy: Anatomy) -> str | None:
    """Why the inside of no expert of a model can be read; None where some can."""
    reasons = dict.fromkeys(s.unreachable for s in anatomy.moe if s.unreachable)
    if any(s.unreachable is None for s in anatomy.moe):
        return None
    return no_routers(anatomy) or "the inside of its experts cannot be read: " + "; ".join(map(str, reasons))


def expectations_at(
    probe: Probe, sublayers: Iterable[Sublayer], tensor: str, per_sublayer: Callable[[Sublayer], int], query: str
) -> list[Expectation]:
    """One expectation for each sublayer at the site `tensor`."""
    found = []
    for s in sublayers:
        site = Site(s.layer, s.block, tensor)
        found.append(
            Expectation(str(site), per_sublayer(s), query, s.layer, s.block, probe.context.problems.get(str(site)))
        )
    return found
