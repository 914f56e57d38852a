"""The shipped corpus has ten balanced labels, short passages, and a source and a licence for each."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from transformers import AutoTokenizer

from moescope.probes.demo import CORPUS_PATH, DOMAINS, MODEL_DIR
from moescope.probes.demo.domains import UNCLEAR_LICENSE
from moescope.probes.demo.sources import is_heldout, pieces


@pytest.fixture(scope="module")
def corpus() -> list[dict[str, str]]:
    return [json.loads(line) for line in CORPUS_PATH.read_text(encoding="utf-8").splitlines()]


def test_every_line_has_the_four_fields(corpus: list[dict[str, str]]) -> None:
    for entry in corpus:
        assert set(entry) == {"text", "label", "source", "license"}
        assert all(isinstance(value, str) and value.strip() for value in entry.values())
        assert entry["license"] != UNCLEAR_LICENSE


def test_ten_labels_have_24_passages_or_more(corpus: list[dict[str, str]]) -> None:
    counts = Counter(entry["label"] for entry in corpus)
    assert sorted(counts) == list(DOMAINS)
    assert min(counts.values()) >= 24


def test_passages_fit_the_context_and_labels_are_balanced(corpus: list[dict[str, str]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    tokens: Counter[str] = Counter()
    for entry in corpus:
        length = len(tokenizer(entry["text"])["input_ids"])
        assert 100 <= length <= 511
        tokens[entry["label"]] += length
    assert 50_000 <= sum(tokens.values()) <= 70_000
    assert max(tokens.values()) < 1.25 * min(tokens.values())


def test_every_passage_is_from_a_heldout_document(corpus: list[dict[str, str]]) -> None:
    assert all(is_heldout(entry["source"]) for entry in corpus)


def test_no_two_passages_share_a_line(corpus: list[dict[str, str]]) -> None:
    for domain in DOMAINS:
        counts = Counter(piece for e in corpus if e["label"] == domain for piece in pieces(e["text"]))
        assert max(counts.values()) == 1


def test_text_is_written_as_itself(corpus: list[dict[str, str]]) -> None:
    raw = CORPUS_PATH.read_text(encoding="utf-8")
    assert next(e["text"] for e in corpus if e["label"] == "japanese")[:20].split("\n")[0] in raw
    assert "\\u" not in raw.replace("\\\\u", "")
