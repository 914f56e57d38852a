"""Recorded vectors as a trainer reads them: every kept row once an epoch, pairs by token, resumed to the bit."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moescope as ms
from moescope.core.errors import InputError, RunError, StoreError
from moescope.sae.data.selection import Filter
from moescope.sae.data.shuffled import ShuffledBatches
from moescope.sae.data.source import VectorSource
from moescope.sae.data.split import held_out

_SPEC = importlib.util.spec_from_file_location("planted_vectors", Path(__file__).with_name("planted_vectors.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
planted = sys.modules.setdefault("planted_vectors", importlib.util.module_from_spec(_SPEC))
_SPEC.loader.exec_module(planted)

SITE, OTHER = "blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"
DOCUMENTS, LENGTH = 60, 30
TOKENS = DOCUMENTS * LENGTH


def told(batch: Any) -> list[int]:
    """The tokens that vectors say they are of."""
    return [round(float(x)) for x in batch[:, 0]]


def marked(tokens: Any, width: int = 5, *, sign: float = 1.0) -> Any:
    """A vector for each token: its number, then noise that follows from it."""
    tokens = np.asarray(tokens)
    noise = np.sin(np.outer(tokens + 1, np.arange(1, width)))
    return (sign * np.concatenate([tokens[:, None], noise], axis=1)).astype(np.float32)


@pytest.fixture
def run(store: Any) -> Any:
    made = planted.plant_run(store, documents=DOCUMENTS, length=LENGTH)
    planted.plant_vectors(store, made, SITE, marked(np.arange(TOKENS)))
    return made


def kept_tokens(share: float = 0.1, first: int = 1) -> tuple[list[int], list[int]]:
    """Tokens to train on and held out, by a plain loop."""
    train, held = [], []
    for token in range(TOKENS):
        document, position = divmod(token, LENGTH)
        if position >= first:
            (held if bool(held_out([document], share)[0]) else train).append(token)
    return train, held


def test_every_kept_row_comes_exactly_once_an_epoch(run: Any) -> None:
    source = VectorSource(run, SITE)
    train, held = kept_tokens()
    assert (source.count, source.held_out_count) == (len(train), len(held))
    batches = source.batches(100, seed=3, buffer_bytes=20_000)  # 62 segments of 8 rows of 20 bytes at a time
    drawn = [token for _ in range(3 * len(train) // 100) for token in told(next(batches))]
    for epoch in range(2):
        assert sorted(drawn[epoch * len(train) : (epoch + 1) * len(train)]) == train
    assert drawn[: len(train)] != drawn[len(train) : 2 * len(train)]
    assert drawn[: len(train)] != train
    assert batches.epoch == pytest.approx(100 * (3 * len(train) // 100) / len(train))


def test_rows_are_mixed_over_the_run(run: Any) -> None:
    batch = told(next(VectorSource(run, SITE).batches(64, seed=0)))
    assert len({token // LENGTH for token in batch}) > 30  # of 54 documents or so, in a batch of 64


def test_vectors_are_those_of_their_tokens(run: Any) -> None:
    for split in ("train", "held_out", "all"):
        batch = next(VectorSource(run, SITE).batches(50, split=split))  # type: ignore[arg-type]  # one of the splits
        assert batch.dtype == torch.float32
        assert np.array_equal(batch.numpy(), marked(told(batch)))


def test_resumed_batches_are_bit_identical(run: Any) -> None:
    source = VectorSource(run, SITE)
    whole = source.batches(77, seed=5, buffer_bytes=20_000)
    expected = [next(whole) for _ in range(60)]
    for stop in (0, 1, 21, 22, 59):  # before, within, and behind the first of the epochs
        begun = source.batches(77, seed=5, buffer_bytes=20_000)
        for _ in range(stop):
            next(begun)
        state = json.loads(json.dumps(begun.state()))
        again = VectorSource(run, SITE).batches(77, seed=5, buffer_bytes=20_000)
        again.restore(state)
        assert all(torch.equal(next(again), batch) for batch in expected[stop:])
        begun.close()
        again.close()


def test_a_state_of_other_batches_is_refused(run: Any) -> None:
    source = VectorSource(run, SITE)
    state = source.batches(10, seed=1).state()
    with pytest.raises(InputError, match="another seed"):
        source.batches(10, seed=2).restore(state)
    with pytest.raises(InputError, match="another number of rows"):
        source.batches(10, seed=1, split="held_out").restore(state)


def test_batches_are_the_callers_own(run: Any) -> None:
    source = VectorSource(run, SITE)
    first, second = source.batches(50, seed=1), source.batches(50, seed=1)
    next(first).zero_()
    next(second)
    assert torch.equal(next(first), next(second))
    assert 0.0 not in told(next(first))  # nothing was zeroed behind the caller's back


def test_first_positions_and_special_tokens_are_left_out_and_it_is_said(store: Any) -> None:
    made = planted.plant_run(store, documents=20, length=10, special=True)
    planted.plant_vectors(store, made, SITE, marked(np.arange(200)))
    source = VectorSource(made, SITE, asked=Filter(skip_first=0, held_out=0.0))
    assert source.count == 180
    assert source.notes == ["20 of 200 vectors were left out: special tokens."]
    both = VectorSource(made, SITE, asked=Filter(skip_first=3, held_out=0.0))
    assert both.count == 140
    assert both.notes == ["60 of 200 vectors were left out: the first 3 tokens of every sequence."]
    assert VectorSource(made, SITE, asked=Filter(skip_first=0, special=True, held_out=0.0)).count == 200


def test_norms_over_a_multiple_of_the_median_are_left_out(store: Any) -> None:
    made = planted.plant_run(store, documents=20, length=10)
    vectors = np.ones((200, 4), np.float32)  # norm 2
    vectors[[15, 33]] = 10.0  # norm 20
    vectors[50] = 4.9  # norm 9.8
    planted.plant_vectors(store, made, SITE, vectors)
    source = VectorSource(made, SITE, asked=Filter(skip_first=0, max_norm_ratio=5.0, held_out=0.0))
    assert source.count == 198
    assert source.notes == ["2 of 200 vectors were left out: norms over 5 times the median (10)."]


def test_statistics_are_those_of_the_vectors_to_train_on(run: Any) -> None:
    train, _ = kept_tokens()
    vectors = marked(train).astype(np.float64)
    found = VectorSource(run, SITE).statistics
    assert found.count == len(train)
    np.testing.assert_allclose(found.mean, vectors.mean(0), rtol=1e-12)
    norms = [sum(x * x for x in row) ** 0.5 for row in vectors]
    assert found.mean_norm == pytest.approx(sum(norms) / len(norms))
    assert found.scale == pytest.approx(5**0.5 / found.mean_norm)
    assert found.total_variance == pytest.approx(vectors.var(0).sum())


def test_a_walk_gives_every_held_out_row_once_in_order(run: Any) -> None:
    _, held = kept_tokens()
    parts = list(VectorSource(run, SITE).walk("held_out", size=37))
    assert [t for part in parts for t in part.token] == held
    assert [t for part in parts for t in told(part.x)] == held
    assert [d for part in parts for d in part.document] == [t // LENGTH for t in held]
    assert [p for part in parts for p in part.position] == [t % LENGTH for t in held]
    sample = VectorSource(run, SITE).held_out(10)
    assert len(sample) == 10
    assert set(told(sample)) <= set(held)


def test_narrow_types_are_converted_exactly(store: Any) -> None:
    made = planted.plant_run(store, documents=4, length=8)
    vectors = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    planted.plant_vectors(
        store, made, SITE, vectors.bfloat16().view(torch.int16).numpy().view(np.uint16), dtype="bfloat16"
    )
    planted.plant_vectors(store, made, OTHER, vectors.half().numpy(), dtype="float16")
    every = Filter(skip_first=0, held_out=0.0)
    assert torch.equal(VectorSource(made, SITE, asked=every).sample(99), vectors.bfloat16().float())
    assert torch.equal(VectorSource(made, OTHER, asked=every).sample(99), vectors.half().float())


def test_pairs_are_of_the_same_token_however_they_lie(store: Any, run: Any) -> None:
    order = np.random.default_rng(0).permutation(TOKENS)[: TOKENS // 2]
    planted.plant_vectors(store, run, OTHER, marked(order, 3, sign=-1.0), token=order, shards=5)
    source = VectorSource(run, SITE, target=OTHER)
    assert source.widths == (5, 3)
    train, held = kept_tokens()
    assert source.count == len(set(train) & set(order.tolist()))
    assert source.held_out_count == len(set(held) & set(order.tolist()))
    assert any("token has none at" in note for note in source.notes)
    batches = source.batches(64)
    for _ in range(30):
        batch = next(batches).numpy()
        assert np.array_equal(batch[:, :5], marked(told(batch)))
        assert np.array_equal(batch[:, 5:], marked(told(batch), 3, sign=-1.0))


def test_one_experts_rows_alone_and_with_the_blocks_input(store: Any, run: Any) -> None:
    slots, inside = np.repeat(np.arange(TOKENS), 2), "blocks.1.mlp.experts.hook_out"
    expert = np.stack([np.arange(TOKENS) % 3, 3 + np.arange(TOKENS) % 2], axis=1).ravel()
    planted.plant_vectors(store, run, inside, marked(slots) * 0.5, token=slots, expert=expert)
    every = Filter(held_out=0.0)
    assert VectorSource(run, inside, asked=every).count == 2 * DOCUMENTS * (LENGTH - 1)
    one = VectorSource(run, inside, expert=2, asked=every)
    mine = [t for t in range(TOKENS) if t % 3 == 2 and t % LENGTH]
    assert [t for part in one.walk("train") for t in part.token] == mine
    paired = VectorSource(run, SITE, target=inside, expert=2, asked=every)
    assert paired.count == len(mine)
    batch = next(paired.batches(200)).numpy()
    assert np.array_equal(batch[:, 5:], batch[:, :5] * 0.5)
    with pytest.raises(InputError, match=r"several of one token at .*experts\.hook_out"):
        VectorSource(run, SITE, target=inside)
    with pytest.raises(InputError, match="no vectors of expert 9") as refused:
        VectorSource(run, inside, expert=9)
    assert "0, 1, 2, 3, 4" in str(refused.value)
    with pytest.raises(InputError, match="of no one expert"):
        VectorSource(run, SITE, expert=2)


def test_heads_are_taken_whole_or_one_by_one(store: Any, run: Any) -> None:
    vectors = np.random.default_rng(0).normal(size=(TOKENS, 3, 4)).astype(np.float32)
    site = "blocks.1.attn.hook_z"
    planted.plant_vectors(store, run, site, vectors)
    every = Filter(skip_first=0, held_out=0.0)
    whole, one = (VectorSource(run, site, head=head, asked=every) for head in (None, 1))
    assert (whole.widths[0], one.widths[0]) == (12, 4)
    assert np.array_equal(whole.sample(TOKENS).numpy(), vectors.reshape(TOKENS, 12))
    assert np.array_equal(one.sample(TOKENS).numpy(), vectors[:, 1])
    with pytest.raises(InputError, match="no head 3"):
        VectorSource(run, site, head=3)
    with pytest.raises(InputError, match="no head 0"):
        VectorSource(run, SITE, head=0)


def test_a_site_without_vectors_is_refused_with_those_that_have_some(run: Any) -> None:
    with pytest.raises(InputError, match=r"kept no vectors at blocks\.0") as refused:
        VectorSource(run, "blocks.0.hook_resid_post")
    assert SITE in str(refused.value)


def test_another_width_is_refused(run: Any, store: Any) -> None:
    with pytest.raises(InputError, match="another width"):
        VectorSource(run, SITE, width=6)
    planted.plant_vectors(store, run, OTHER, marked(np.arange(10), 4), shards=1)
    store.connection.execute("UPDATE activations SET shard = 1 WHERE site = ?", [OTHER])
    folder = store.path.parent / store.fetch("SELECT path FROM activations WHERE site = ?", [OTHER])[0][0]
    folder.rename(folder.with_name("kept.safetensors"))
    planted.plant_vectors(store, run, OTHER, marked(np.arange(10, 20), 5), shards=1)
    folder.rename(folder.with_name("wide.safetensors"))
    folder.with_name("kept.safetensors").rename(folder)
    store.connection.execute(
        "UPDATE activations SET path = replace(path, '00000', 'wide') WHERE site = ? AND shard = 0", [OTHER]
    )
    with pytest.raises(StoreError, match="another shape"):
        VectorSource(run, OTHER)


def test_damaged_shards_are_named(run: Any, store: Any) -> None:
    first = store.path.parent / store.fetch("SELECT min(path) FROM activations WHERE site = ?", [SITE])[0][0]
    whole = first.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    first.write_bytes(whole[:begin] + bytes([whole[begin] ^ 1]) + whole[begin + 1 :])  # the last bit of a number
    VectorSource(run, SITE)  # its size is right
    with pytest.raises(StoreError, match=r"00000\.safetensors is not the file that was recorded"):
        VectorSource(run, SITE, verify=True)
    first.write_bytes(whole[:-5])
    with pytest.raises(StoreError, match=r"00000\.safetensors is not whole"):
        VectorSource(run, SITE)
    first.unlink()
    with pytest.raises(StoreError, match=r"00000\.safetensors is missing"):
        VectorSource(run, SITE)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_refused_with_token_and_file(store: Any, bad: float) -> None:
    made = planted.plant_run(store, documents=20, length=10)
    vectors = marked(np.arange(200))
    vectors[123, 2] = bad
    planted.plant_vectors(store, made, SITE, vectors)
    source = VectorSource(made, SITE, asked=Filter(held_out=0.0))
    with pytest.raises(RunError, match=r"of token 123, in .*00001\.safetensors"):
        next(source.batches(50))


def test_too_few_vectors_say_how_many_and_how_to_get_more(run: Any) -> None:
    source = VectorSource(run, SITE)
    with pytest.raises(InputError, match="too few vectors") as refused:
        source.batches(5000)
    assert f"{source.count:,}" in str(refused.value)
    assert "sae record" in str(refused.value)
    with pytest.raises(InputError, match=r"no vectors .* that count"):
        VectorSource(run, SITE, asked=Filter(skip_first=LENGTH))


@pytest.mark.parametrize("options", [{"skip_first": -1}, {"held_out": 1.0}, {"max_norm_ratio": 0.0}])
def test_filters_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Filter(**options)


def test_memory_is_bounded_by_the_buffer() -> None:
    """No read takes more rows than half the buffer holds."""
    reads: list[int] = []

    def gather(rows: Any) -> Any:
        reads.append(len(rows))
        return np.repeat(rows[:, None], 64, axis=1).astype(np.float32)

    batches = ShuffledBatches(np.arange(20_000), gather, 64, 500, buffer_bytes=1 << 20)
    for _ in range(80):
        next(batches)
    batches.close()
    assert max(reads) * 64 * 4 <= 1 << 19
    assert sum(reads) >= 40_000 - max(reads)


def test_a_recorded_run_gives_the_models_vectors(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    module, ids = tiny_model("llama"), token_ids((9, 4, 12, 7))
    run = record_ids(module, ids, probes=[], sites=["blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out"], batch_size=1)
    source = VectorSource(
        run, "blocks.0.mlp.hook_in", target="blocks.0.hook_mlp_out", asked=Filter(skip_first=0, held_out=0.0)
    )
    batch = next(source.batches(32))
    with torch.no_grad():
        torch.testing.assert_close(module.model.layers[0].mlp(batch[:, :32]), batch[:, 32:], rtol=1e-4, atol=1e-5)
    assert ms.load(module).anatomy.d_model == source.widths[0]
