"""Per-token numbers of a paired pass summed by sequence, and within sequences by place in the text and by kind of token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.probes.effects.paired import PairedBatch
from moescope.probes.pieces import CLASSES, Pieces

GROUPS = ("label", "position", "class")
TOKEN_METRICS = ("delta_nll", "kl", "flips")
# Places in a sequence, first and last: fine at the beginning, where there is little to predict from.
_FIRST_PLACES = (1, 4, 16, 64, 256, 1024, 4096, 16384)

Group = tuple[str, str | None]
Sums = NDArray[np.float64]


def check_groups(groups: Sequence[str]) -> None:
    """Raise `InputError` for a grouping that is none."""
    if unknown := [group for group in groups if group not in GROUPS]:
        raise InputError(f"tokens cannot be grouped by {unknown[0]!r}", expected=", ".join(GROUPS))


@dataclass(frozen=True)
class Tallied:
    """Sums over the predicted tokens of every sequence and group.

    Attributes:
        sequence, document: [sequence] ids.
        label: [sequence] label of the document, None where it has none.
        groups: (kind, value) of each group of tokens, the first being all of them.
        n: [sequence, group] predicted tokens.
        base_nll: [sequence, group] sum of the unedited model's NLL, nats.
        sums: [variant, metric, sequence, group] sums of `TOKEN_METRICS`.
    """

    sequence: NDArray[np.int64]
    document: NDArray[np.int64]
    label: NDArray[np.object_]
    groups: tuple[Group, ...]
    n: NDArray[np.int64]
    base_nll: Sums
    sums: Sums

    def of(self, variant: int) -> dict[str, Sums]:
        """The sums of one variant, [sequence, group] by metric."""
        return dict(zip(TOKEN_METRICS, self.sums[variant], strict=True))


class Tally:
    """Sums paired batches up.

    Args:
        groups: of `GROUPS`; labels need none of this (a document has one), so that only the others are summed apart.
        tokenizer: tells the classes of tokens; without one there are none.
    """

    def __init__(self, *, groups: Sequence[str] = GROUPS, tokenizer: Any = None) -> None:
        check_groups(groups)
        self._groups: list[Group] = [("all", None)]
        if "position" in groups:
            self._groups += [("position", name) for name in _place_names()]
        self._pieces = Pieces(tokenizer) if "class" in groups and tokenizer is not None else None
        if self._pieces is not None:
            self._groups += [("class", name) for name in CLASSES]
        self._places = "position" in groups
        self._ids: list[tuple[int, int, str | None]] = []
        self._n: list[NDArray[np.int64]] = []
        self._base: list[Sums] = []
        self._sums: list[Sums] = []

    def add(self, paired: PairedBatch) -> None:
        """Take in a batch."""
        self._ids += [(s.sequence_id, s.document_id, s.document.label) for s in paired.batch.sequences]
        member = self._members(paired)
        values = np.stack([getattr(paired, name) for name in TOKEN_METRICS], axis=1)
        self._n.append(member.sum(1))
        self._base.append(np.einsum("rp,rpg->rg", paired.base_nll, member.astype(np.float64)))
        self._sums.append(np.einsum("vmrp,rpg->vmrg", values, member.astype(np.float64)))

    def done(self) -> Tallied:
        """The sums so far; groups without a token are left out.

        Raises:
            InputError: nothing was predicted.
        """
        n = np.concatenate(self._n) if self._n else np.zeros((0, 1), np.int64)
        if not n[:, 0].sum():
            raise InputError(
                "no token of the corpus is predicted", found="only sequences of one token", fix="give longer texts"
            )
        kept = np.flatnonzero(n.sum(0))
        sequence, document, label = zip(*self._ids, strict=True)
        return Tallied(
            np.array(sequence),
            np.array(document),
            np.array(label, dtype=object),
            tuple(self._groups[i] for i in kept),
            n[:, kept],
            np.concatenate(self._base)[:, kept],
            np.concatenate(self._sums, axis=2)[..., kept],
        )

    def _members(self, paired: PairedBatch) -> NDArray[np.bool_]:
        """[row, position, group] Which tokens belong to which group."""
        parts = [paired.predicted[..., None]]
        if self._places:
            place = np.searchsorted(_FIRST_PLACES, np.arange(paired.ids.shape[1]), side="right") - 1
            one_row = place[:, None] == np.arange(len(_FIRST_PLACES))
            parts.append(np.broadcast_to(one_row, (len(paired.ids), *one_row.shape)))
        if self._pieces is not None:
            _, classes = self._pieces.describe(paired.ids.ravel())
            codes = classes.indices.to_numpy().reshape(paired.ids.shape)
            parts.append(codes[..., None] == np.arange(len(CLASSES)))
        return np.concatenate([parts[0], *(part & parts[0] for part in parts[1:])], axis=-1)


def _place_names() -> list[str]:
    """`1–3`, `4–15`, …"""
    ends = [first - 1 for first in _FIRST_PLACES[1:]]
    return [f"{first}–{end}" for first, end in zip(_FIRST_PLACES, ends, strict=False)] + [f"{_FIRST_PLACES[-1]}–"]
