"""What a probe is, and what it is given."""

from __future__ import annotations

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
from moescope.probes.batches import Batch
from moescope.store.coverage import Expectation
from moescope.store.writer import BatchRecords

Tensors = Mapping[str, torch.Tensor]
Arrays = Mapping[str, NDArray[Any]]


@dataclass
class ProbeContext:
    """What every probe of a run shares.

    Attributes:
        anatomy: of the model.
        tokenizer: of the model, None without one.
        scores: (layer, block) → how logits become scores (`softmax` or `sigmoid`), where the weights show it.
        verified: (layer, block) of routers whose rule reproduces their decisions.
        problems: site → why its records are not to be trusted; a probe adds to it from `rows`.
    """

    anatomy: Anatomy
    tokenizer: Any = None
    scores: dict[tuple[int, str], str] = field(default_factory=dict)
    verified: frozenset[tuple[int, str]] = frozenset()
    problems: dict[str, str] = field(default_factory=dict)

    def report(self, site: Site | str, problem: str) -> None:
        """Note a problem at a site; the first one stays."""
        self.problems.setdefault(str(site), problem)


@dataclass
class HostBatch:
    """One batch after the forward pass, on the host.

    Attributes:
        batch: its sequences.
        mask: [row, position] real tokens.
        kept: site → what the probe's `tap` kept there, as arrays.
        outputs: `nll` and `predicted_id`, [row · position].
    """

    batch: Batch
    mask: NDArray[np.bool_]
    kept: Mapping[Site, Arrays]
    outputs: Arrays

    @cached_property
    def real(self) -> NDArray[np.int64]:
        """Which of the row · position places are real tokens, in order."""
        return np.flatnonzero(self.mask)

    @property
    def token(self) -> NDArray[np.int64]:
        """Run-wide number of each unmasked token of the batch, in order."""
        return np.arange(self.batch.first_token, self.batch.first_token + self.batch.tokens)

    @property
    def labels(self) -> NDArray[np.int64]:
        """Index into `label_names` of each unmasked token."""
        index = {name: number for number, name in enumerate(self.label_names)}
        return np.repeat([index[s.document.label] for s in self.batch.sequences], self.batch.lengths)

    @property
    def label_names(self) -> list[str | None]:
        """Labels in the batch, in order of appearance."""
        return list(dict.fromkeys(s.document.label for s in self.batch.sequences))


class Probe(ABC):
    """Records one kind of thing at sites during a forward pass, as rows.

    `tap` runs inside the forward pass, on the model's device, and must not read anything back to the host. `rows` runs
    later, on the writing thread.
    """

    def __init__(self, context: ProbeContext) -> None:
        self.context = context

    @abstractmethod
    def sites(self, anatomy: Anatomy) -> list[Site]:
        """Where the probe wants to be called."""

    @abstractmethod
    def tap(self, site: Site, tensors: Tensors) -> Tensors:
        """Reduce what passes a site to the small tensors worth keeping."""

    @abstractmethod
    def rows(self, host: HostBatch, records: BatchRecords) -> None:
        """Turn what was kept of one batch into rows, added to `records`."""

    @abstractmethod
    def expectations(self, tokens: int, sequences: int) -> list[Expectation]:
        """What a corpus of so many unmasked tokens and sequences must have given."""

    def close(self) -> None:  # noqa: B027  most probes hold nothing
        """Let go of what the probe holds."""


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
