"""`VectorSource`: the vectors that a run kept at a site, as a trainer reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.core.site_names import read_site
from moescope.core.sites import EXPERT_OUT, EXPERT_POST, Site
from moescope.sae.data.selection import Filter, select
from moescope.sae.data.shuffled import ShuffledBatches
from moescope.sae.data.site_rows import Rows, SiteRows
from moescope.sae.data.statistics import VectorStatistics, statistics_of
from moescope.store.run import Run

Split = Literal["train", "held_out", "all"]


@dataclass(frozen=True)
class VectorPart:
    """Some vectors and what they are of.

    Attributes:
        x: [row, component] float32; of a source with a target, [input, target] beside each other.
        token: [row] run-wide number of each one's token.
        document, position: [row] of that token.
        expert: [row] at sites inside experts, None elsewhere.
    """

    x: NDArray[np.float32]
    token: NDArray[np.int64]
    document: NDArray[np.int64]
    position: NDArray[np.int32]
    expert: NDArray[np.int32] | None


class VectorSource:
    """Vectors of one site, or of two sites token by token, filtered and split by document.

    Args:
        run: whose vectors they are, with its tokens.
        site: any at which it kept vectors.
        target: a second site, for transcoders: every batch holds [input, target] of the same token beside each other.
        expert: inside experts, the one expert whose vectors to take; None for all of them.
        head: at a site of heads, the one head whose part to take; None for all heads side by side.
        asked: which vectors count, and which are held out.
        width: components that are expected of the input; None for whatever there are.
        verify: check every shard against its checksum first, which reads it whole; that none is cut short is always checked.

    Raises:
        InputError: no vectors were kept there (it says where some were), no such expert or head, another width, vectors of two
            sites that cannot be paired, none left.
        StoreError: a shard is missing or damaged.
        RunError: with `max_norm_ratio`, and whenever vectors are read: a vector that is not finite (it says of which token).

    Attributes:
        site, target_site: the sites.
        widths: components of the input, and of the target or None.
        count, held_out_count: vectors to train on, and held out.
        notes: what was left out and why, one sentence each.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> site = "blocks.2.hook_resid_post"
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     texts = ["A text of some words."] * 20
        ...     run = ms.record(ms.load("demo"), texts, store, name="r", probes=[], sites=[site], progress=False)
        ...     source = VectorSource(run, site)
        ...     batch = next(source.batches(16, seed=1))
        >>> batch.shape == (16, source.widths[0])
        True
    """

    def __init__(
        self,
        run: Run,
        site: str | Site,
        *,
        target: str | Site | None = None,
        expert: int | None = None,
        head: int | None = None,
        asked: Filter | None = None,
        width: int | None = None,
        verify: bool = False,
    ) -> None:
        self.site, self.target_site = read_site(site), None if target is None else read_site(target)
        self._run, self._asked, self._expert, self._head = run, asked or Filter(), expert, head
        inside = [s is not None and s.tensor in (EXPERT_OUT, EXPERT_POST) for s in (self.site, self.target_site)]
        # Of two sites either may be the one inside experts: from a block's input to one expert's output, say.
        own, other = (expert if of_experts or not any(inside) else None for of_experts in inside)
        self._inputs = SiteRows(run, self.site, expert=own, head=head, width=width, verify=verify)
        self._targets: SiteRows | None = None
        self._partner: Rows | None = None
        if self.target_site is not None:
            self._targets = SiteRows(run, self.target_site, expert=other, verify=verify)
            self._partner = partners(self._inputs, self._targets, run)
        self._selection = select(run, self._inputs, self._asked)
        self.notes = list(self._selection.notes)
        self._rows = self._split_rows()
        self.count, self.held_out_count = len(self._rows["train"]), len(self._rows["held_out"])
        if not self.count + self.held_out_count:
            raise InputError(
                f"run {run.name!r} has no vectors at {self.site} that count",
                found=" ".join(self.notes) or "none",
                fix="record more text, or leave less out",
            )

    @property
    def widths(self) -> tuple[int, int | None]:
        """Components of the input, and of the target."""
        return self._inputs.width, None if self._targets is None else self._targets.width

    @property
    def nbytes(self) -> int:
        """Bytes of the shards it reads."""
        return self._inputs.nbytes + (0 if self._targets is None else self._targets.nbytes)

    def batches(
        self,
        batch_size: int,
        seed: int = 0,
        *,
        split: Split = "train",
        device: str | torch.device = "cpu",
        buffer_bytes: int = 128 << 20,
    ) -> ShuffledBatches:
        """Shuffled batches without end, [row, component] float32; see `ShuffledBatches`.

        Raises:
            InputError: fewer vectors than a batch takes.
        """
        rows, width = self._rows[split], sum(w or 0 for w in self.widths)
        if len(rows) < batch_size:
            raise InputError(
                f"run {self._run.name!r} kept too few vectors at {self.site} for a batch of {batch_size:,}",
                expected=f"at least {batch_size:,} ({split.replace('_', ' ')})",
                found=" ".join([f"{len(rows):,}.", *self.notes]),
                fix="use smaller batches (batch_size), or record more: more text, or a larger share of its tokens "
                "(moescope sae record --tokens, --sample)",
            )
        return ShuffledBatches(
            rows, self.gather, width, batch_size, seed=seed, device=device, buffer_bytes=buffer_bytes
        )

    def gather(self, rows: Rows) -> NDArray[np.float32]:
        """Vectors of some rows of the input's site, with their targets beside them."""
        found = self._inputs.gather(rows)
        if self._targets is None or self._partner is None:
            return found
        return np.concatenate([found, self._targets.gather(self._partner[rows])], axis=1)

    def walk(self, split: Split = "held_out", size: int = 4096) -> Iterator[VectorPart]:
        """Every vector of a split once, in the order in which they were recorded, some at a time."""
        rows, found = self._rows[split], self._selection
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            expert = None if self._inputs.expert is None else self._inputs.expert[part]
            yield VectorPart(
                self.gather(part), self._inputs.token[part], found.document[part], found.position[part], expert
            )

    def sample(self, rows: int, split: Split = "train") -> Float[torch.Tensor, "row component"]:
        """Some of the vectors, evenly spread over them; all where there are fewer."""
        numbers = self._rows[split]
        if len(numbers) > rows:
            numbers = numbers[np.linspace(0, len(numbers) - 1, rows).astype(np.int64)]
        return torch.from_numpy(self.gather(numbers))

    def held_out(self, rows: int) -> Float[torch.Tensor, "row component"]:
        """Some of the vectors held out; all where there are fewer, none where none are."""
        return self.sample(rows, "held_out")

    @cached_property
    def statistics(self) -> VectorStatistics:
        """Mean, mean norm, scale and total variance of all input vectors to train on."""
        rows = self._rows["train"]
        return statistics_of(self._inputs.gather(rows[at : at + 8192]) for at in range(0, len(rows), 8192))

    def facts(self) -> dict[str, Any]:
        """What decides which vectors these are, as JSON data."""
        asked = asdict(self._asked)
        return {
            "available": self.count,
            "held_out_share": asked.pop("held_out"),
            **asked,
            "expert": self._expert,
            "head": self._head,
        }

    def _split_rows(self) -> dict[Split, Rows]:
        train, held = self._selection.train, self._selection.held_out
        if self._partner is not None:
            alone = self._partner < 0
            if lost := int(alone[train].sum() + alone[held].sum()):
                self.notes.append(f"{lost:,} vectors were left out: their token has none at {self.target_site}.")
            train, held = train[~alone[train]], held[~alone[held]]
        return {"train": train, "held_out": held, "all": np.union1d(train, held)}


def partners(inputs: SiteRows, targets: SiteRows, run: Run) -> Rows:
    """The row of `targets` with the same token as each row of `inputs`, −1 where there is none.

    Raises:
        InputError: several vectors of one token at either site, or no token with vectors at both.
    """
    for rows in (inputs, targets):
        if len(np.unique(rows.token)) < len(rows.token):
            raise InputError(
                f"vectors at {inputs.site} and {targets.site} cannot be paired",
                found=f"several of one token at {rows.site}",
                fix="name one expert, or a site with one vector a token",
            )
    order = np.argsort(targets.token, kind="stable")
    at = np.minimum(np.searchsorted(targets.token[order], inputs.token), len(order) - 1)
    found = np.where(targets.token[order][at] == inputs.token, order[at], -1)
    if (found < 0).all():
        raise InputError(
            f"run {run.name!r} kept no token's vectors at both {inputs.site} and {targets.site}",
            fix="record both sites in one run",
        )
    return found
