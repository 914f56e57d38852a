"""From documents to batches: nothing lost, nothing doubled, in corpus order, with a mask of exactly the real tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import moescope as ms
from moescope.probes.batches import Batch, BatchPlan
from moescope.probes.live_model import LiveModel


def byte_tokenizer(*, bos: bool, eos: bool) -> Any:
    """A byte-level tokenizer without merges: one token a byte, two special tokens, put around a text as asked."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<bos>": 0, "<eos>": 1, **{character: n + 2 for n, character in enumerate(alphabet)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    template = " ".join([*(["<bos>"] * bos), "$A", *(["<eos>"] * eos)])
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<bos>", 0), ("<eos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


def plan(source: Any, tokenizer: Any = None, batch_size: int = 4, max_length: int = 8) -> BatchPlan:
    corpus = source if isinstance(source, ms.Corpus) else ms.Corpus.load(source)
    return BatchPlan(corpus, tokenizer, batch_size, max_length)


def ids_of(batches: list[Batch]) -> list[list[int]]:
    return [sequence.token_ids.tolist() for batch in batches for sequence in batch.sequences]


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=23), min_size=1, max_size=9),
    batch_size=st.integers(1, 5),
    max_length=st.integers(2, 9),
)
def test_batches_hold_every_token_once_in_order_padded_at_either_side(
    documents: list[list[int]], batch_size: int, max_length: int
) -> None:
    batches = list(plan(ms.Corpus.from_token_ids(documents), None, batch_size, max_length))
    sequences = [sequence for batch in batches for sequence in batch.sequences]
    assert [batch.number for batch in batches] == list(range(len(batches)))
    assert [len(batch.sequences) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert 1 <= len(batches[-1].sequences) <= batch_size
    assert [s.sequence_id for s in sequences] == list(range(len(sequences)))
    joined: dict[int, list[int]] = {}
    for s in sequences:
        assert 1 <= len(s.token_ids) <= max_length
        assert (s.part == 0) == (s.document_id not in joined)
        joined.setdefault(s.document_id, []).extend(s.token_ids.tolist())
    assert joined == dict(enumerate(documents))
    for batch in batches:
        ids, mask = batch.padded(pad_id=-7)
        assert ids.shape == mask.shape == (len(batch.sequences), max(len(s.token_ids) for s in batch.sequences))
        assert batch.tokens == mask.sum()
        for row, real, s in zip(ids, mask, batch.sequences, strict=True):
            n = len(s.token_ids)
            assert real.tolist() == [True] * n + [False] * (len(row) - n)
            assert row.tolist() == [*s.token_ids.tolist(), *[-7] * (len(row) - n)]
        ids, mask = batch.padded(pad_id=-7, side="left")
        for row, real, s in zip(ids, mask, batch.sequences, strict=True):
            n = len(s.token_ids)
            assert real.tolist() == [False] * (len(row) - n) + [True] * n
            assert row.tolist() == [*[-7] * (len(row) - n), *s.token_ids.tolist()]


@settings(max_examples=80, deadline=None)
@given(
    texts=st.lists(
        st.text(min_size=1, max_size=30).filter(lambda text: text.strip("\ufeff \t\r\n")), min_size=1, max_size=4
    ),
    max_length=st.integers(3, 12),
    bos=st.booleans(),
    eos=st.booleans(),
)
def test_parts_of_a_text_hold_its_tokens_and_its_characters_once(
    texts: list[str], max_length: int, bos: bool, eos: bool
) -> None:
    """One token a byte: most cuts fall within a character; the special tokens stand around every part."""
    made = plan(texts, byte_tokenizer(bos=bos, eos=eos), 3, max_length)
    sequences = [s for batch in made for s in batch.sequences]
    for number, text in enumerate(texts):
        parts = [s for s in sequences if s.document_id == number]
        assert [s.part for s in parts] == list(range(len(parts)))
        assert "".join(s.text for s in parts) == text
        inner: list[int] = []
        for s in parts:
            ids = s.token_ids.tolist()
            assert len(ids) <= max_length
            assert ids[:bos] == [0] * bos
            assert ids[len(ids) - eos :] == [1] * eos
            inner += ids[bos : len(ids) - eos]
        assert inner == byte_tokenizer(bos=False, eos=False)(text)["input_ids"]
        assert len(inner) == len(text.encode())
    assert made.split_documents == sum(len(t.encode()) + bos + eos > max_length for t in texts)


def test_a_text_that_just_fits_is_not_split() -> None:
    tokenizer = byte_tokenizer(bos=True, eos=True)
    assert ids_of(list(plan(["sixsix"], tokenizer, max_length=8))) == [tokenizer("sixsix")["input_ids"]]
    assert len(ids_of(list(plan(["sixsix!"], tokenizer, max_length=8)))) == 2


@pytest.mark.parametrize(
    "text", ["The quick brown fox. " * 9, "  leading and double  spaces " * 5, "日本語とемодзи 👩‍🔬 " * 6]
)
def test_parts_of_the_demo_tokenizer_join_to_the_text_and_its_tokens(text: str, demo_model: Any) -> None:
    """Tokens of many characters, a beginning-of-sequence token before each part."""
    sequences = [s for batch in plan([text], demo_model.tokenizer, 3, 10) for s in batch.sequences]
    whole = demo_model.tokenizer(text)["input_ids"]
    assert len(sequences) > 3
    assert "".join(s.text for s in sequences) == text
    assert {int(s.token_ids[0]) for s in sequences} == {whole[0]} == {demo_model.tokenizer.bos_token_id}
    assert [i for s in sequences for i in s.token_ids.tolist()[1:]] == whole[1:]


def test_a_tokenizer_without_offsets_splits_too() -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    text = "no offsets from this tokenizer"
    sequences = [s for batch in plan([text], tokenizer, 3, 10) for s in batch.sequences]
    assert "".join(s.text for s in sequences) == text
    assert {int(s.token_ids[-1]) for s in sequences} == {tokenizer.eos_token_id}
    assert [i for s in sequences for i in s.token_ids.tolist()[:-1]] == tokenizer(text)["input_ids"][:-1]


@pytest.mark.parametrize("max_length", [1, 2])
def test_a_length_with_no_room_beside_the_special_tokens_is_refused(max_length: int) -> None:
    with pytest.raises(ms.InputError, match="max_length"):
        list(plan(["longer than two tokens"], byte_tokenizer(bos=True, eos=True), 1, max_length))


def test_a_text_corpus_needs_a_tokenizer() -> None:
    with pytest.raises(ms.InputError, match="no tokenizer"):
        list(plan(["some text"]))


def test_the_same_documents_give_the_same_plan_every_time() -> None:
    made = plan(["one", "two and more", "three"], byte_tokenizer(bos=True, eos=False), 2, 5)
    first, second = list(made), list(made)
    assert ids_of(first) == ids_of(second)
    assert made.split_documents == 2
    assert [s.content_hash for b in first for s in b.sequences] == [s.content_hash for b in second for s in b.sequences]


def test_content_hashes_tell_sequences_apart() -> None:
    made = plan(ms.Corpus.from_token_ids([[1, 2], [1, 2], [2, 1], [1], [1, 2, 0], [258], [513]]))
    hashes = [s.content_hash for batch in made for s in batch.sequences]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 6


def test_a_corpus_is_walked_batch_by_batch() -> None:
    taken: list[int] = []

    class Endless:
        features = None

        def __iter__(self) -> Any:
            for number in range(10**9):
                taken.append(number)
                yield {"token_ids": [number % 90 + 1, 2]}

    walk = iter(plan(ms.Corpus.load(Endless()), batch_size=4))
    next(walk), next(walk)
    assert len(taken) <= 9


@pytest.mark.parametrize("bad", [97, 5000])
def test_an_id_that_the_model_does_not_have_is_refused_before_anything_runs(
    bad: int, tiny_model: Callable[..., Any], record_ids: Callable[..., Any], store: Any
) -> None:
    with pytest.raises(ms.InputError, match=f"{bad:,}"):
        record_ids(tiny_model("qwen3_moe"), [[1, 2], [3, bad]])
    assert store.runs() == []


def test_the_largest_id_of_the_model_is_taken(tiny_model: Callable[..., Any], record_ids: Callable[..., Any]) -> None:
    assert record_ids(tiny_model("qwen3_moe"), [[96, 0]]).status == "complete"


def test_sequences_of_one_token_are_recorded_without_a_loss(
    tiny_model: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    run = record_ids(tiny_model("qwen3_moe"), [[5], [6], [7, 8]], batch_size=2)
    assert run.status == "complete"
    assert run.info["summary"]["single_token_sequences"] == 2
    rows = run.store.fetch("SELECT token, sequence_id, position, nll IS NULL FROM tokens ORDER BY token")
    assert rows == [(0, 0, 0, True), (1, 1, 0, True), (2, 2, 0, True), (3, 2, 1, False)]
    assert run.rows("routing") == 8


def test_a_text_of_one_token_is_recorded_without_a_loss(tiny_model: Callable[..., Any], store: Any) -> None:
    module = tiny_model("llama", vocab_size=300)
    model = ms.load(module, tokenizer=byte_tokenizer(bos=False, eos=False))
    run = ms.record(model, ["a", "b"], store, name="run", progress=False)
    assert run.status == "complete"
    assert store.fetch("SELECT n_tokens FROM sequences") == [(1,), (1,)]
    assert store.fetch("SELECT nll, predicted_id IS NULL FROM tokens") == [(None, False), (None, False)]


def test_a_long_document_is_stored_in_parts_that_share_its_label(
    tiny_model: Callable[..., Any], record_ids: Callable[..., Any], token_ids: Callable[..., Any]
) -> None:
    sequences = token_ids((20, 3))
    run = record_ids(tiny_model("qwen3_moe"), sequences, max_length=8, labels=["long", "short"])
    query = "SELECT sequence_id, document_id, part, label, n_tokens FROM sequences ORDER BY sequence_id"
    assert run.store.fetch(query) == [
        (0, 0, 0, "long", 8),
        (1, 0, 1, "long", 8),
        (2, 0, 2, "long", 4),
        (3, 1, 0, "short", 3),
    ]
    stored = [i for (i,) in run.store.fetch("SELECT token_id FROM tokens ORDER BY token")]
    assert stored == [i for ids in sequences for i in ids]
    assert run.info["summary"]["split_documents"] == 1
    positions = run.store.fetch("SELECT position, nll IS NULL FROM tokens ORDER BY token")
    assert positions == [(p, p == 0) for n in (8, 8, 4, 3) for p in range(n)]


def test_no_sequence_is_longer_than_the_models_context(
    tiny_model: Callable[..., Any], record_ids: Callable[..., Any], token_ids: Callable[..., Any]
) -> None:
    run = record_ids(tiny_model("gpt2"), token_ids((150,)), max_length=100)
    assert run.status == "complete"
    assert run.info["settings"]["max_length"] == 64
    assert run.store.fetch("SELECT n_tokens FROM sequences ORDER BY sequence_id") == [(64,), (64,), (22,)]


def test_sequences_keep_what_the_document_came_with(demo_model: Any, store: Any) -> None:
    rows = [{"text": "One.", "label": "x", "source": "web", "page": 3, "tags": ["ä", None]}, {"text": "Two."}]
    ms.record(demo_model, rows, store, name="run", progress=False)
    found = store.fetch("SELECT label, source, text, metadata FROM sequences ORDER BY sequence_id")
    assert found[0][:3] == ("x", "web", "One.")
    assert json.loads(found[0][3]) == {"page": 3, "tags": ["ä", None]}
    assert found[1] == (None, "item 1", "Two.", None)


def test_padding_uses_an_id_that_the_model_has(tiny_model: Callable[..., Any], store: Any) -> None:
    """A tokenizer may have had a pad token added that the model's embedding never heard of."""
    tokenizer = byte_tokenizer(bos=True, eos=False)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    module = tiny_model("llama", vocab_size=258)
    assert tokenizer.pad_token_id == 258
    run = ms.record(ms.load(module, tokenizer=tokenizer), ["longer", "b"], store, name="run", progress=False)
    assert run.status == "complete"


def test_what_stands_in_padding_changes_nothing(
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Decisions and counts to the letter; numbers to the rounding of a product whose other rows changed."""
    query = "SELECT nll FROM tokens WHERE run_id = ? AND position > 0 ORDER BY token"
    found, losses = [], []
    for pad in (0, 50):
        monkeypatch.setattr(LiveModel, "pad_id", pad)
        run = record_ids(tiny_model("qwen3_moe"), token_ids((3, 12, 7)), name=f"padded with {pad}")
        assert run.status == "complete"
        found.append(
            [
                run.store.fetch(f"SELECT {columns} FROM {table} WHERE run_id = ? ORDER BY ALL", [run.run_id])
                for table, columns in (
                    ("routing", "token, layer, experts"),
                    ("loads", "layer, expert, tokens"),
                    ("experts", "layer, expert, tokens, max_abs_token, max_abs_channel"),
                    ("residual", "token, layer, top_channels"),
                    ("tokens", "token, predicted_id"),
                )
            ]
        )
        losses.append([nll for (nll,) in run.store.fetch(query, [run.run_id])])
    assert found[0] == found[1]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
