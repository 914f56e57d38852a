"""A limit of tokens draws documents, so that a corpus sorted by label is not read at one end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moescope.sae.experts.run_text import run_text


def test_a_part_of_a_sorted_corpus_holds_every_label(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    labels = [label for label in "abcd" for _ in range(20)]
    run = record_ids(tiny_model("llama"), token_ids((5,) * 80), labels=labels, probes=[])
    text = run_text(run, tokens=200)
    assert (text.n_documents, text.tokens) == (40, 200)
    read = [s for batch in text.batches(8) for s in batch.sequences]
    assert [s.document_id for s in read] == sorted(text.documents.tolist()), "whole documents, in order"
    assert {s.document.label for s in read} == set("abcd")
    again = run_text(run, tokens=200)
    assert again.documents.tolist() == text.documents.tolist()


def test_without_a_limit_every_document_is_read(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    run = record_ids(tiny_model("llama"), token_ids((5,) * 9), probes=[])
    assert [s.document_id for b in run_text(run).batches(4) for s in b.sequences] == list(range(9))
