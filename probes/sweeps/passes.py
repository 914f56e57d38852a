"""The passes of a sweep: one plain pass a batch, then rows of (variant, sequence) that begin where their edits do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moescope.core.errors import RunError
from moescope.probes.batches import Batch
from moescope.probes.edits.session import edited
from moescope.probes.forward import DeviceBatch, logits_of, to_device
from moescope.probes.live_model import LiveModel
from moescope.probes.sweeps.base_side import METRICS, BaseSide
from moescope.probes.sweeps.prefix import Kept, Prefix, rows_of
from moescope.probes.sweeps.variants import Group, Variant

# Called with so many (variant, sequence) pairs as are done, computed or known to be zero.
Tick = Callable[[int], None]


@dataclass
class GroupSums:
    """What the variants of a group did, summed over the predicted tokens of each sequence.

    Attributes:
        group: the variants.
        sequence, document: [sequence] ids.
        label: [sequence] label of the document, None where it has none.
        n: [sequence] predicted tokens.
        base_nll: [sequence] sum of the plain model's NLL, nats.
        sums: [variant, metric, sequence] sums of `METRICS`.
        rows, skipped: pairs of a variant and a sequence that ran, and that were known to be zero.
    """

    group: Group
    sequence: NDArray[np.int64]
    document: NDArray[np.int64]
    label: NDArray[np.object_]
    n: NDArray[np.int64]
    base_nll: NDArray[np.float64]
    sums: NDArray[np.float64]
    rows: int = 0
    skipped: int = 0


@dataclass
class SweepPasses:
    """Runs groups of variants over batches.

    Attributes:
        model: what runs.
        pass_size: pairs of a variant and a sequence that share one edited pass.
        sources: run name → run, for edits that replay a recorded one.
        resume: begin passes at the edited layer where the model allows it; otherwise every pass is whole.
        prefix: how passes begin there.
        whole: layer → why passes begin at the bottom instead.
    """

    model: LiveModel
    pass_size: int = 8
    sources: Mapping[str, Any] = field(default_factory=dict)
    resume: bool = True
    prefix: Prefix = field(init=False)
    whole: dict[int, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.prefix = Prefix(self.model)

    def run(
        self, groups: Sequence[Group], batches: Iterable[Batch], tick: Tick = lambda pairs: None
    ) -> list[GroupSums]:
        """Sums of every group over all batches; one plain pass a batch serves all groups.

        Raises:
            InputError: an edit that this model cannot take.
            RunError: logits that are no numbers, with or without an edit.
        """
        parts: list[list[_Part]] = [[] for _ in groups]
        with torch.no_grad():
            for batch in batches:
                for number, part in enumerate(self._batch(groups, batch, tick)):
                    parts[number].append(part)
        return [_joined(group, found) for group, found in zip(groups, parts, strict=True)]

    def _batch(self, groups: Sequence[Group], batch: Batch, tick: Tick) -> Iterator[_Part]:
        on_device = to_device(batch, self.model)
        begins = [group.layer if self._resumable(group, on_device) else 0 for group in groups]
        routers = {v.only[:2] for group in groups for v in group.variants if v.only is not None}
        kept = self.prefix.plain(on_device, layers=begins if self.resume else (), routers=routers)
        assert kept.logits is not None
        base = BaseSide(kept.logits, on_device.ids, batch.lengths.tolist())
        if not bool(base.nll.isfinite().all()):
            raise RunError(
                "the model's logits are no numbers, without any edit",
                found=f"NaN or infinity in batch {batch.number}",
                fix="load it in another dtype (float32, bfloat16)",
            )
        for group in groups:
            yield self._group(group, batch, on_device, kept, base, tick)

    def _group(
        self, group: Group, batch: Batch, on_device: DeviceBatch, kept: Kept, base: BaseSide, tick: Tick
    ) -> _Part:
        """The rows of one group over one batch."""
        pairs = _pairs(group, kept, on_device, base)
        shape = len(group.variants), len(METRICS), len(batch.sequences)
        totals = torch.zeros(shape, device=base.nll.device, dtype=torch.float64)
        tick(shape[0] * shape[2] - len(pairs))
        sequences = [s.sequence_id for s in batch.sequences]
        for variants, chunks in self._sessions(group, pairs):
            with edited(
                self.model, [group.variants[v].intervention for v in variants], sources=self.sources
            ) as session:
                place = {variant: number for number, variant in enumerate(variants)}
                for chunk in chunks:
                    rows = [row for _, row in chunk]
                    session.assign([place[variant] for variant, _ in chunk])
                    session.begin([sequences[row] for row in rows])
                    index = torch.tensor(rows, device=on_device.ids.device)
                    with self._begun(group, kept, index):
                        logits = logits_of(self.model, rows_of(on_device, index))
                    totals[[v for v, _ in chunk], :, rows] = base.against(logits, rows).T
                    del logits  # before the next pass makes its own
                    tick(len(chunk))
        sums: NDArray[np.float64] = totals.cpu().numpy()[_same(group)]
        _check(batch, sums, group)
        n = np.array([base.tokens(row) for row in range(len(batch.sequences))])
        return _Part(batch, n, base.nll.cpu().numpy(), sums, len(pairs))

    def _sessions(
        self, group: Group, pairs: list[tuple[int, int]]
    ) -> Iterator[tuple[list[int], list[list[tuple[int, int]]]]]:
        """Variants of a session and its passes: all together, unless they change parameters."""
        alone = any(v.changes_weights for v in group.variants)
        for variant in range(len(group.variants)) if alone else (None,):
            mine = [pair for pair in pairs if variant is None or pair[0] == variant]
            if mine:
                variants = list(dict.fromkeys(v for v, _ in mine))
                yield variants, [mine[start : start + self.pass_size] for start in range(0, len(mine), self.pass_size)]

    def _begun(self, group: Group, kept: Kept, rows: torch.Tensor) -> AbstractContextManager[None]:
        if not self.resume or group.layer in self.whole:
            return nullcontext()
        return self.prefix.resumed(group.layer, kept, rows, attention=group.behind_attention)

    def _resumable(self, group: Group, batch: DeviceBatch) -> bool:
        if not self.resume:
            return False
        if group.layer not in self.whole and (reason := self.prefix.why_not(group.layer, batch)):
            self.whole[group.layer] = reason
        return group.layer not in self.whole


@dataclass
class _Part:
    """Sums over one batch."""

    batch: Batch
    n: NDArray[np.int64]
    base_nll: NDArray[np.float64]
    sums: NDArray[np.float64]
    rows: int


def _pairs(group: Group, kept: Kept, batch: DeviceBatch, base: BaseSide) -> list[tuple[int, int]]:
    """Pairs of a variant and a row whose effect is not zero from the start; rows side by side, as a pass takes them."""
    fires = _firing(kept, batch)
    predicted = [row for row in range(kept.rows) if base.tokens(row)]
    same = _same(group)
    found: list[tuple[int, int]] = []
    for number, variant in enumerate(group.variants):
        if same[number] == number:
            found += [(number, row) for row in predicted if _touches(variant, row, fires)]
    return found


def _touches(variant: Variant, row: int, fires: dict[tuple[int, str], NDArray[np.bool_]]) -> bool:
    """Whether a variant may change anything in a row: not at strength 0, nor where it changes one expert's tokens alone, and
    there are none."""
    if all(edit.strength == 0 for edit in variant.intervention.edits):
        return False
    only = variant.only
    known = None if only is None else fires.get(only[:2])
    if only is None or known is None:
        return True
    return only[2] < known.shape[1] and bool(known[row, only[2]])


def _same(group: Group) -> list[int]:
    """For every variant, the first one with the same edits: they run once (random sets that several scores share)."""
    first: dict[str, int] = {}
    return [first.setdefault(v.intervention.named(None).to_json(), i) for i, v in enumerate(group.variants)]


def _firing(kept: Kept, batch: DeviceBatch) -> dict[tuple[int, str], NDArray[np.bool_]]:
    """Router → [row, expert] whether any of the row's tokens, but its last, which predicts nothing, took the expert."""
    following = batch.mask.clone()
    following[:, :-1] &= batch.mask[:, 1:]
    following[:, -1] = False
    found = {}
    for router, ids in kept.routed.items():
        taken = following.to(ids.device).unsqueeze(-1).expand_as(ids)
        ours = torch.zeros(kept.rows, int(ids.max()) + 1, dtype=torch.int64, device=ids.device)
        ours.scatter_add_(1, ids.flatten(1), taken.flatten(1).long())
        found[router] = ours.cpu().numpy() > 0
    return found


def _joined(group: Group, parts: Sequence[_Part]) -> GroupSums:
    sequences = [s for part in parts for s in part.batch.sequences]
    sums = np.concatenate([part.sums for part in parts], axis=-1)
    rows = sum(part.rows for part in parts)
    return GroupSums(
        group,
        np.array([s.sequence_id for s in sequences]),
        np.array([s.document_id for s in sequences]),
        np.array([s.document.label for s in sequences], dtype=object),
        np.concatenate([part.n for part in parts]),
        np.concatenate([part.base_nll for part in parts]),
        sums,
        rows,
        sums.shape[0] * sums.shape[2] - rows,
    )


def _check(batch: Batch, sums: NDArray[np.float64], group: Group) -> None:
    """Raise `RunError` where an edited pass gave no numbers."""
    bad = np.argwhere(~np.isfinite(sums))
    if len(bad):
        variant: Variant = group.variants[int(bad[0][0])]
        raise RunError(
            f"after the edit the model's predictions are no numbers ({variant.intervention.name or 'unnamed'})",
            found=f"NaN or infinity in sequence {batch.sequences[int(bad[0][2])].sequence_id:,}",
            fix="take a smaller strength, or another dtype; nothing of this group was stored",
        )
