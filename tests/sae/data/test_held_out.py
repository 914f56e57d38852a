"""The split of documents: by their number alone."""

from __future__ import annotations

import numpy as np
import pytest

from moescope.core.errors import InputError
from moescope.sae.data.split import held_out


def test_a_document_decides_for_itself() -> None:
    everything = held_out(np.arange(1000), 0.2, 3)
    some = np.random.default_rng(0).permutation(1000)[:100]
    assert np.array_equal(held_out(some, 0.2, 3), everything[some])
    assert np.array_equal(held_out(np.array([[4, 4], [7, 4]]), 0.2, 3), everything[[[4, 4], [7, 4]]])


def test_shares_are_kept_and_smaller_ones_are_parts_of_larger() -> None:
    small, large = (held_out(np.arange(50_000), share) for share in (0.1, 0.3))
    assert small.mean() == pytest.approx(0.1, abs=0.006)  # four standard deviations
    assert large.mean() == pytest.approx(0.3, abs=0.009)
    assert not (small & ~large).any()
    assert not held_out(np.arange(100), 0.0).any()


def test_seeds_hold_out_others() -> None:
    first, second = (held_out(np.arange(50_000), 0.1, seed) for seed in (0, 1))
    assert (first & second).mean() == pytest.approx(0.01, abs=0.002)


@pytest.mark.parametrize("share", [1.0, -0.1, 7])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(InputError, match="share"):
        held_out([1], share)
