"""Which batches a merge takes from which shard, and by how much their tokens move."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moescope.core.errors import InputError
from moescope.store.merge_shards import Shard, ShardBatch


@dataclass(frozen=True)
class Segment:
    """Batches of one shard that follow each other in the plan, and so in the merged run.

    Attributes:
        shard: where they are from.
        batches: in order.
        shift: what to add to the shard's token numbers.
    """

    shard: Shard
    batches: tuple[ShardBatch, ...]
    shift: int

    @property
    def batch_range(self) -> tuple[int, int]:
        """First batch, and one past the last."""
        return self.batches[0].number, self.batches[-1].number + 1

    @property
    def sequence_range(self) -> tuple[int, int]:
        """First sequence, and one past the last."""
        return self.batches[0].first_sequence, self.batches[-1].first_sequence + self.batches[-1].sequences

    @property
    def token_range(self) -> tuple[int, int]:
        """First token as the shard numbers them, and one past the last."""
        return self.batches[0].first_token, self.batches[-1].first_token + self.batches[-1].tokens


@dataclass(frozen=True)
class Part:
    """What a merge takes from one shard.

    Attributes:
        shard: the shard.
        taken: batches taken from it, by number.
        left: batches that another shard gives, by number.
    """

    shard: Shard
    taken: tuple[ShardBatch, ...]
    left: tuple[ShardBatch, ...]


@dataclass(frozen=True)
class MergePlan:
    """A merge, settled before a row is copied.

    Attributes:
        parts: one a shard, in the order given.
        segments: in the order of the plan.
        plan_batches: batches of the whole plan; None where no shard came to its end.
    """

    parts: tuple[Part, ...]
    segments: tuple[Segment, ...]
    plan_batches: int | None

    @property
    def missing(self) -> str | None:
        """Which batches of the plan no shard has, in words; None where all are there."""
        there = {batch.number for part in self.parts for batch in part.taken}
        stop = self.plan_batches if self.plan_batches is not None else max(there, default=-1) + 1
        gaps = _ranges(n for n in range(stop) if n not in there)
        if gaps:
            return f"no shard has {gaps} of the plan" + ("" if self.plan_batches is None else f"'s {stop:,}")
        return (
            None
            if self.plan_batches is not None
            else f"no shard goes on to the end of the plan, after batch {stop - 1}"
        )


def plan_merge(shards: Sequence[Shard]) -> MergePlan:
    """Settle who gives which batch: of several shards that have it the first, those without a gap before all others.

    Raises:
        InputError: the shards cut the corpus differently, or none has a batch.
    """
    owner: dict[int, tuple[Shard, ShardBatch]] = {}
    for shard in sorted(shards, key=lambda shard: not shard.full):
        for batch in shard.batches:
            other, same = owner.setdefault(batch.number, (shard, batch))
            _check_same(shard, batch, other, same)
    if not owner:
        raise InputError("the shards hold no batch", fix="record them again")
    parts = []
    for shard in shards:
        taken = tuple(batch for batch in shard.batches if owner[batch.number][0] is shard)
        left = tuple(batch for batch in shard.batches if owner[batch.number][0] is not shard)
        parts.append(Part(shard, taken, left))
    ends = {shard.plan_batches for shard in shards} - {None}
    if len(ends) > 1 or (ends and max(owner) >= min(end for end in ends if end is not None)):
        raise InputError(
            "the shards are not parts of one plan: they disagree about how many batches it has",
            found=", ".join(map(str, sorted({*(end for end in ends if end is not None), max(owner) + 1}))),
        )
    return MergePlan(tuple(parts), _segments(owner), next(iter(ends), None))


def _segments(owner: dict[int, tuple[Shard, ShardBatch]]) -> tuple[Segment, ...]:
    found: list[tuple[Shard, int, list[ShardBatch]]] = []
    token = 0
    last: tuple[Shard, ShardBatch] | None = None
    for number in sorted(owner):
        shard, batch = owner[number]
        if last is not None and last[1].number + 1 == number:
            _check_follows(last, (shard, batch))
        shift = token - batch.first_token
        if found and found[-1][0] is shard and found[-1][1] == shift:
            found[-1][2].append(batch)
        else:
            found.append((shard, shift, [batch]))
        token += batch.tokens
        last = shard, batch
    return tuple(Segment(shard, tuple(batches), shift) for shard, shift, batches in found)


def _check_follows(last: tuple[Shard, ShardBatch], now: tuple[Shard, ShardBatch]) -> None:
    expected = last[1].first_sequence + last[1].sequences
    if now[1].first_sequence != expected:
        raise InputError(
            f"{now[0].path} and {last[0].path} are not parts of one plan",
            expected=f"batch {now[1].number} to begin with sequence {expected}",
            found=f"sequence {now[1].first_sequence}",
        )


def _check_same(shard: Shard, batch: ShardBatch, other: Shard, same: ShardBatch) -> None:
    if (batch.first_sequence, batch.sequences) != (same.first_sequence, same.sequences):
        raise InputError(
            f"{shard.path} and {other.path} are not parts of one plan: they cut batch {batch.number} differently",
            expected=f"{same.sequences} sequences from {same.first_sequence}",
            found=f"{batch.sequences} sequences from {batch.first_sequence}",
        )


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers in words, neighbours joined; empty for none. Example: batches 3 to 5 and 9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] + 1 == number:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    if not runs:
        return ""
    told = [str(first) if first == last else f"{first} to {last}" for first, last in runs[:10]]
    more = f" and {len(runs) - 10} more ranges" if len(runs) > 10 else ""
    one = len(runs) == 1 and runs[0][0] == runs[0][1]
    return f"batch{'' if one else 'es'} {', '.join(told)}{more}"
