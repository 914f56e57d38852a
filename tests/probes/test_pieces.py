"""Bytes and class of tokens, whatever way their tokenizer spells them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import moescope as ms
from moescope.probes.pieces import CLASSES, Pieces, classify, token_bytes

TEXTS = [
    "Hello, world! 42",
    "Straße für Käse",
    "日本語のテキスト",
    "👩‍🔬🇩🇪 emoji",
    "\ttab\n\n  spaces",
    "mixed日本 a1b2",
]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_the_tokens_of_a_text_are_the_bytes_of_the_text(text: str, demo_model: Any) -> None:
    ids = demo_model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(token_bytes(demo_model.tokenizer, i) for i in ids) == text.encode()


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=20))
def test_byte_level_tokens_give_back_every_byte(text: str) -> None:
    vocabulary = {character: n for n, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = tokenizer(text)["input_ids"]
    assert b"".join(token_bytes(tokenizer, i) for i in ids) == text.encode()


@pytest.mark.parametrize(("piece", "raw"), [("<0x0A>", b"\n"), ("<0xE6>", b"\xe6"), ("▁the", b" the"), ("the", b"the")])
def test_pieces_of_sentencepiece_give_their_bytes(piece: str, raw: bytes) -> None:
    """As LLaMA's tokenizer is built: byte pieces for what it does not know, a mark for a leading space."""
    backend = Tokenizer(models.BPE(vocab={"<0x0A>": 0, "<0xE6>": 1, "▁the": 2, "the": 3, "<unk>": 4}, merges=[]))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert token_bytes(tokenizer, tokenizer.convert_tokens_to_ids(piece)) == raw


def test_an_id_that_the_tokenizer_does_not_have_has_no_bytes(demo_model: Any) -> None:
    assert token_bytes(demo_model.tokenizer, 10**6) == b""


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (b"the", "word"),
        (b" the", "word"),
        ("Käse".encode(), "word"),
        ("日本".encode(), "word"),
        (b" 42", "digit"),
        ("४२".encode(), "digit"),
        (b"),", "punctuation"),
        (b" +=", "punctuation"),
        ("👩".encode(), "punctuation"),
        (b" \n\t", "space"),
        (b"", "space"),
        ("\u3000".encode(), "space"),
        (b"a1", "mixed"),
        (b"don't", "mixed"),
        (b"\xe6", "fragment"),
        (b"a\xe6\x97", "fragment"),
    ],
)
def test_class_of_a_token_is_that_of_its_characters(raw: bytes, name: str) -> None:
    assert classify(raw) == name
    assert name in CLASSES


def test_without_a_tokenizer_nothing_is_said_of_tokens() -> None:
    special, classes = Pieces(None).describe(np.array([1, 2, 3]))
    assert special.tolist() == [False] * 3
    assert classes.to_pylist() == [None] * 3
    assert Pieces(None).unseen(np.array([1, 2])).num_rows == 0


def test_an_id_is_written_once_a_run(demo_model: Any) -> None:
    pieces = Pieces(demo_model.tokenizer)
    assert pieces.unseen(np.array([5, 3, 5]))["token_id"].to_pylist() == [3, 5]
    assert pieces.unseen(np.array([3, 4]))["token_id"].to_pylist() == [4]


def test_recorded_vocabulary_spells_the_text_and_names_special_tokens(demo_model: Any, store: Any) -> None:
    text = TEXTS[0]
    run = ms.record(demo_model, [text, TEXTS[2]], store, name="run", batch_size=1, progress=False)
    query = """
        SELECT t.token_id, t.is_special, t.class, v.bytes
        FROM tokens t
        LEFT JOIN vocabulary v USING (run_id, token_id)
        WHERE run_id = ? AND sequence_id = 0
        ORDER BY token
    """
    (first, *rest) = store.fetch(query, [run.run_id])
    assert first[:3] == (demo_model.tokenizer.bos_token_id, True, "special")
    assert b"".join(raw for *_, raw in rest) == text.encode()
    assert {(special, name == "special") for _, special, name, _ in rest} == {(False, False)}
    ((unknown, repeated),) = store.fetch(
        """
        SELECT
            count(*) FILTER (WHERE token_id NOT IN (SELECT token_id FROM vocabulary)),
            (SELECT count(*) - count(DISTINCT token_id) FROM vocabulary)
        FROM (SELECT token_id FROM tokens UNION SELECT predicted_id FROM tokens)
        """
    )
    assert (unknown, repeated) == (0, 0), "every id, also a predicted one, is spelled once"
