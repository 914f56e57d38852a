"""`Patch`: vectors recorded in another run of the same texts put into the stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from moescope.core.edit_kinds.stream import Patch
from moescope.core.errors import InputError, RunError
from moescope.core.sites import Site
from moescope.probes.edits.now import Now
from moescope.probes.edits.step import Place, step
from moescope.probes.edits.steps.stream import SiteStep, exact, width_at
from moescope.store.run import Run
from moescope.store.vectors import VectorShard, vector_shards


@dataclass
class _Recorded:
    """What a run kept of the sequences of one batch, on the device."""

    sequences: tuple[int, ...]
    vectors: Float[torch.Tensor, "row position d_model"]
    kept: Bool[torch.Tensor, "row position"]
    ids: Int[torch.Tensor, "row position"]


@step("patch")
class PatchStep(SiteStep[Patch]):
    """given + strength · (recorded − given) at every token whose vector the run kept; other tokens keep every bit.

    The vectors of a batch are read from the run's shards before its first pass, and laid out by sequence and position.
    """

    def __init__(self, edits: Sequence[Patch | None], place: Place) -> None:
        edit = next(edit for edit in edits if edit is not None)
        self.run: Run = place.sources[edit.run]
        self.recorded: _Recorded | None = None
        self.other_text: torch.Tensor | None = None
        self.shards = [*vector_shards(self.run, str(Site(place.layer, "", edit.site)))]
        self.row_of = _rows_by_token(self.shards)
        super().__init__(edits, place)

    @staticmethod
    def form(edit: Any) -> Any:
        """The site and the run."""
        return edit.site, edit.run

    @classmethod
    def why_not(cls, edit: Any, place: Place) -> str | None:
        """Why an edit cannot be made in a place; None where it can."""
        run = place.sources.get(edit.run)
        if run is None:
            given = ", ".join(map(repr, place.sources)) or "none"
            return f"the run {edit.run!r} is not among the given ones ({given}); pass sources={{{edit.run!r}: run}}"
        site = str(Site(place.layer, "", edit.site))
        try:
            shard = next(vector_shards(run, site))
        except InputError as missing:
            return f"{missing.problem}; record it again with sites=[{site!r}]"
        if shard.raw.shape[-1] != (width := width_at(edit.site, place) or 0):
            return f"its vectors have {shard.raw.shape[-1]:,} numbers, the stream {width:,}"
        if not run.store.fetch("SELECT 1 FROM tokens WHERE run_id = ? LIMIT 1", [run.run_id]):
            return (
                f"the run {edit.run!r} does not tell the places of its tokens; record it again with the probe `tokens`"
            )
        return super().why_not(edit, place)

    def changed(self, given: torch.Tensor, amount: torch.Tensor, now: Now) -> torch.Tensor:
        """The stream with the recorded vectors."""
        if now.sequences is None:
            raise RunError(
                "Patch does not know which texts are running",
                expected="the ids of the sequences in the batch, as in the run it is from",
                fix="call session.begin([...]) before the pass",
            )
        if self.recorded is None or self.recorded.sequences != now.sequences:
            self.begin(now.sequences)
        assert self.recorded is not None
        found = self.recorded
        last = found.kept.shape[1] - 1
        position, ids, mask = (t.to(given.device) for t in (now.position, now.ids, now.mask))
        place = position.clamp(0, last)
        kept = found.kept.gather(1, place) & (position <= last) & mask
        other = (kept & (found.ids.gather(1, place) != ids) & (amount[..., 0] != 0)).any()
        self.other_text = other if self.other_text is None else self.other_text | other
        vectors = found.vectors.gather(1, place[..., None].expand(-1, -1, given.shape[-1]))
        wide = exact(given)
        moved = torch.lerp(wide, vectors.to(wide), amount.to(wide.dtype).expand_as(wide)).to(given.dtype)
        return torch.where(kept[..., None], moved, given)

    def begin(self, sequences: tuple[int, ...]) -> None:
        """Read the vectors of the sequences that the next rows are.

        Raises:
            RunError: the passes since the last call were of other texts than the recorded ones.
        """
        if reason := self.fault():
            raise RunError(reason, fix="run the texts of that run, in batches announced by session.begin")
        self.recorded = self._read(sequences, self.amounts.device)

    def fault(self) -> str | None:
        """What was wrong with the passes so far, read back after them: another text than the recorded one; None for nothing."""
        if self.other_text is None or not bool(self.other_text):
            return None
        self.other_text = None
        return f"the texts that ran under Patch are not those of run {self.run.name!r}: their tokens differ"

    def _read(self, sequences: tuple[int, ...], device: torch.device) -> _Recorded:
        """Vectors of the sequences, [row, position, d_model]; a row for each, the same sequence as often as it is asked for."""
        query = """
            SELECT sequence_id, position, token, token_id
            FROM tokens
            WHERE run_id = $run AND sequence_id IN (SELECT unnest($sequences::BIGINT[]))
            ORDER BY token
        """
        asked = {"run": self.run.run_id, "sequences": sorted(set(sequences))}
        table = np.array(self.run.store.fetch(query, asked), dtype=np.int64).reshape(-1, 4)
        length = int(table[:, 1].max(initial=0)) + 1
        vectors = np.zeros((len(sequences), length, self.shards[0].raw.shape[-1]), np.float32)
        kept, ids = np.zeros((len(sequences), length), bool), np.zeros((len(sequences), length), np.int64)
        for row, sequence in enumerate(sequences):
            _, position, token, token_id = table[table[:, 0] == sequence].T
            ids[row, position] = token_id
            for shard, (tokens, rows) in zip(self.shards, self.row_of, strict=True):
                at = np.searchsorted(tokens, token).clip(max=max(0, len(tokens) - 1))
                hit = tokens[at] == token if len(tokens) else np.zeros(len(token), bool)
                vectors[row, position[hit]] = _float32(shard, rows[at[hit]])
                kept[row, position[hit]] = True
        return _Recorded(sequences, *(torch.from_numpy(a).to(device) for a in (vectors, kept, ids)))


def _rows_by_token(shards: list[VectorShard]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """For each shard its tokens, sorted, and the row of each."""
    orders = [np.argsort(shard.token, kind="stable") for shard in shards]
    return [(np.asarray(shard.token)[order], order) for shard, order in zip(shards, orders, strict=True)]


def _float32(shard: VectorShard, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    raw = np.asarray(shard.raw[rows])
    if shard.dtype == "bfloat16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return raw.astype(np.float32)
