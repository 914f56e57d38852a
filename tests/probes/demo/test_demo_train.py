"""Training resumes to the same bits, schedules as stated, and balances each layer by itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from moescope.probes.demo.architecture import balance_loss, build_model, losses
from moescope.probes.demo.rows import RowSource
from moescope.probes.demo.train import TrainConfig, train

TINY = TrainConfig(steps=12, rows_a_step=2, row_length=16, warmup_steps=3, checkpoint_every=4, curve_every=1, threads=2)


def tiny_model() -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=16,
        tie_word_embeddings=True,
        bos_token_id=0,
    )
    return build_model(config, seed=3)


def tiny_rows() -> RowSource:
    """Three domains whose ordinary tokens are 3 to 14, 15 to 26 and 27 to 38."""
    generator = np.random.default_rng(5)
    documents = {
        domain: [np.concatenate([[0], generator.integers(low, low + 12, size=25), [1]]) for _ in range(n_documents)]
        for domain, low, n_documents in (("one", 3, 6), ("two", 15, 4), ("three", 27, 9))
    }
    return RowSource(documents, seed=1, length=16, bos=0)


@pytest.fixture(autouse=True)
def _restore_torch_settings() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def test_resumed_training_equals_unbroken_training(tmp_path: Path) -> None:
    unbroken = tiny_model()
    whole = train(unbroken, tiny_rows(), TINY, checkpoint=tmp_path / "whole.pt")
    for stop_after in (3, 8):
        part = tiny_model()
        train(part, tiny_rows(), TINY, checkpoint=tmp_path / "parts.pt", stop_after=stop_after)
        torch.manual_seed(stop_after)  # a new process begins with some other random state
    resumed = tiny_model()
    progress = train(resumed, tiny_rows(), TINY, checkpoint=tmp_path / "parts.pt")
    assert [p["loss"] for p in progress.curves] == [p["loss"] for p in whole.curves]
    for (name, a), b in zip(unbroken.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(next(unbroken.parameters()), next(tiny_model().parameters()))


def test_rows_hold_one_domain_each_in_turn_and_begin_with_bos() -> None:
    rows = tiny_rows()
    for turn in range(30):
        domains = []
        for row in (rows.row(3 * turn + i) for i in range(3)):
            assert row.shape == (16,)
            assert row[0] == 0
            (domain,) = {(token - 3) // 12 for token in row if token > 2}
            domains.append(domain)
        assert sorted(domains) == [0, 1, 2]


def test_an_epoch_of_rows_holds_nearly_every_token_once() -> None:
    rows = tiny_rows()
    epoch = [rows.row(i) for i in range(3 * rows.rows_an_epoch["one"])]
    read = np.bincount(np.concatenate(epoch), minlength=40)[3:15]
    written = np.bincount(np.concatenate(rows.documents["one"]), minlength=40)[3:15]
    assert 0 <= (written - read).sum() <= 15
    assert (read <= written + 1).all()  # a row that begins a document also holds the next row's first token


def test_learning_rate_warms_up_and_ends_at_its_share() -> None:
    config = dataclasses.replace(TINY, steps=1000, warmup_steps=100, peak_lr=1.0, final_lr_share=0.1)
    assert config.learning_rate(0) == pytest.approx(0.01)
    assert config.learning_rate(99) == pytest.approx(1.0)
    assert config.learning_rate(100) == pytest.approx(1.0)
    assert config.learning_rate(999) == pytest.approx(0.1)


def test_balance_loss_is_one_when_even_and_experts_over_k_when_collapsed() -> None:
    even = torch.eye(4).repeat(5, 1) * 30
    assert balance_loss((even,), top_k=1).item() == pytest.approx(1.0, abs=1e-4)
    collapsed = torch.tensor([[30.0, 0, 0, 0]]).repeat(20, 1)
    assert balance_loss((collapsed,), top_k=1).item() == pytest.approx(4.0, abs=1e-4)


def test_opposite_imbalances_of_two_layers_do_not_cancel() -> None:
    left = torch.tensor([[30.0, 0.0]]).repeat(20, 1)
    right = torch.tensor([[0.0, 30.0]]).repeat(20, 1)
    assert balance_loss((left, right), top_k=1).item() == pytest.approx(2.0, abs=1e-4)


def test_predicting_bos_is_left_out_of_the_loss() -> None:
    model = tiny_model().eval()
    rows = torch.tensor([[0, 5, 6, 0, 7, 8]])
    with torch.no_grad():
        nll, _ = losses(model, rows)
        log_probabilities = model(input_ids=rows).logits[0].log_softmax(dim=-1)
    expected = -torch.stack([log_probabilities[i, rows[0, i + 1]] for i in (0, 1, 3, 4)]).mean()
    assert nll.item() == pytest.approx(expected.item(), rel=1e-5)
