"""A plan walked in pieces: the same batches, the corpus read once, and the end known with the last batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import moescope as ms
from moescope.probes.batches import BatchPlan
from moescope.probes.plan_walk import PlanWalk


def plan_of(sequences: int, batch_size: int = 2) -> BatchPlan:
    return BatchPlan(ms.Corpus.from_token_ids([[n + 1] * 3 for n in range(sequences)]), None, batch_size, 16)


def ids(batches: list[Any]) -> list[tuple[int, list[int]]]:
    return [(b.number, [s.sequence_id for s in b.sequences]) for b in batches]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_pieces_together_are_the_plan(size: int) -> None:
    plan = plan_of(9)
    walk = PlanWalk(plan_of(9))
    found = [batch for start in range(0, 10, size) for batch in walk.take(range(start, start + size))]
    assert ids(found) == ids(list(plan))
    assert [s.token_ids.tolist() for b in found for s in b.sequences] == [[n + 1] * 3 for n in range(9)]


def test_any_order_gives_the_same_batches() -> None:
    whole = ids(list(plan_of(9)))
    walk = PlanWalk(plan_of(9))
    for wanted in (range(3, 5), range(1), range(1, 4), range(4, 8), range(2, 3)):
        assert ids(walk.take(wanted)) == whole[wanted.start : wanted.stop]


def test_the_end_is_known_with_the_last_batch_and_not_before() -> None:
    walk = PlanWalk(plan_of(8))
    assert len(walk.take(range(3))) == 3
    assert walk.length is None
    assert len(walk.take(range(3, 4))) == 1
    assert walk.length == 4
    assert walk.take(range(4, 6)) == []
    assert walk.take(range(100, 101)) == []
    assert walk.length == 4


def test_a_plan_without_batches_ends_at_once() -> None:
    walk = PlanWalk(BatchPlan(ms.Corpus.load([]), None, 2, 16))
    assert walk.take(range(5)) == []
    assert walk.length == 0


def test_rising_ranges_read_the_corpus_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    plain = BatchPlan._sequences

    def counted(self: BatchPlan) -> Iterator[Any]:
        for sequence in plain(self):
            reads.append(sequence.sequence_id)
            yield sequence

    monkeypatch.setattr(BatchPlan, "_sequences", counted)
    walk = PlanWalk(plan_of(12))
    for wanted in (range(1), range(2, 4), range(5, 9)):
        walk.take(wanted)
    assert reads == list(range(12))
