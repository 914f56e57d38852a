"""The card's baselines and its measure of specialization agree with closed forms and a count by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moescope.probes.demo.baselines import count_bigrams, fit_with
from moescope.probes.demo.heldout import Reading
from moescope.probes.demo.specialization import layer_use, mutual_information_bits

BOS, EOS = 0, 1


def _document(*ids: int) -> np.ndarray:
    return np.asarray([BOS, *ids, EOS])


def test_bigram_counts_leave_out_eos_and_weigh_domains_alike() -> None:
    counts = count_bigrams(
        {"small": [_document(2, 3)], "large": [_document(2, 2), _document(3, 2), _document(2, 2)]}, n_tokens=4
    )
    assert counts[:, EOS].sum() == 0
    assert counts.sum() == pytest.approx(8)
    assert counts[BOS, 2] == pytest.approx(2 + 2 * 4 / 6)
    assert counts[2, 3] == pytest.approx(2)
    assert counts[3, 2] == pytest.approx(4 / 6)


def test_bigram_probabilities_sum_to_one_and_match_the_formula() -> None:
    counts = count_bigrams({"one": [_document(2, 3, 2, 2)]}, n_tokens=4)
    model = fit_with(counts, unigram_k=0.5, bigram_k=2.0)
    assert model.unigram.sum() == pytest.approx(1)
    for before in range(4):
        total = sum(math.exp(-model.nll_nats(np.asarray([before, after]))[0]) for after in range(4))
        assert total == pytest.approx(1)
    p_two = (3 + 0.5) / (4 + 0.5 * 4)
    assert model.nll_nats(np.asarray([2, 2]))[0] == pytest.approx(-math.log((1 + 2 * p_two) / (2 + 2)))


def test_mutual_information_of_independence_and_identity() -> None:
    assert mutual_information_bits(np.outer([1, 2, 3], [4, 5])) == pytest.approx(0, abs=1e-12)
    assert mutual_information_bits(np.eye(8, dtype=np.int64) * 5) == pytest.approx(3)


def _reading(label: str, expert: int) -> Reading:
    experts = np.full((1, 11, 1), expert)
    experts[:, 0] = 3  # the <bos> position, which must not count
    return Reading(label, 10, np.zeros(10), experts)


def test_planted_specialization_stands_out_of_its_control() -> None:
    readings = [_reading(label, expert) for expert, label in enumerate("ab") for _ in range(20)]
    use = layer_use(readings, n_experts=4, draws=100)[0]
    assert use.information_bits == pytest.approx(1)
    assert use.control_p99_bits < 0.3
    assert use.n_unused == 2
    assert (use.min_share, use.max_share) == (0, 0.5)
