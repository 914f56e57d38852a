"""Two sets of prompts, halved: experts are chosen on one half and tested on the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moescope.core.errors import InputError
from moescope.probes.corpus import Corpus, Document

Labels = tuple[str, str]


@dataclass(frozen=True)
class Halves:
    """The prompts of both sets, labelled.

    Attributes:
        chosen_on, tested_on: corpora; no prompt is in both.
        labels: of the first and the second set.
        notes: what a reader must know of the sets.
    """

    chosen_on: Corpus
    tested_on: Corpus
    labels: Labels
    notes: tuple[str, ...] = ()


def halved(prompts_a: Any, prompts_b: Any, *, labels: Labels = ("a", "b"), seed: int = 0) -> Halves:
    """Label two sets of prompts and halve each at random; equal prompts go to the same half.

    Args:
        prompts_a, prompts_b: two corpora, anything `Corpus.load` takes, or lists of lists of token ids; labels of their own are
            set aside.
        labels: names of the sets.
        seed: of the halves.

    Raises:
        InputError: a set with fewer than two different prompts, the same set twice, texts in one and token ids in the
            other, or one name for both.

    Example:
        >>> found = halved(["Yes.", "No.", "Well."], ["Oui.", "Non."])
        >>> [(d.label, len(d.text)) for d in found.tested_on]
        [('a', 4), ('b', 4)]
    """
    if labels[0] == labels[1]:
        raise InputError(f"both sets are called {labels[0]!r}", expected="two names")
    sets = [list(_corpus_of(given)) for given in (prompts_a, prompts_b)]
    keys = [[_key(document) for document in documents] for documents in sets]
    for name, own in zip(labels, keys, strict=True):
        if len(set(own)) < 2:
            raise InputError(
                f"set {name!r} has too few prompts",
                expected="at least two different ones: experts are chosen on one half and tested on the other",
                found=f"{len(set(own))}",
            )
    if Counter(keys[0]) == Counter(keys[1]):
        raise InputError("both sets hold the same prompts", expected="two sets that differ in what is to be found")
    if len({document.token_ids is None for documents in sets for document in documents}) > 1:
        raise InputError("some prompts are texts and others token ids", fix="give all of them alike")
    shared = set(keys[0]) & set(keys[1])
    notes = (f"{len(shared):,} prompts are in both sets.",) if shared else ()
    order = list(dict.fromkeys([*keys[0], *keys[1]]))
    rank = dict(zip(order, np.random.default_rng(seed).permutation(len(order)).tolist(), strict=True))
    parts: tuple[list[tuple[Document, str]], list[tuple[Document, str]]] = ([], [])
    for documents, own, label in zip(sets, keys, labels, strict=True):
        different = sorted(set(own), key=rank.__getitem__)
        tested = set(different[: len(different) // 2])
        for document, key in zip(documents, own, strict=True):
            parts[key in tested].append((document, label))
    # A prompt of both sets could be chosen on in one and tested on in the other.
    chosen = {_key(document) for document, _ in parts[0]}
    kept = [pair for pair in parts[1] if _key(pair[0]) not in chosen]
    if {label for _, label in kept} != set(labels):
        raise InputError(
            "too few prompts are in one set only", found=f"{len(shared):,} in both", fix="give sets that differ"
        )
    return Halves(_corpus(parts[0]), _corpus(kept), labels, notes)


def _corpus_of(given: Any) -> Corpus:
    """A corpus; from lists of token ids too."""
    ids = isinstance(given, (list, tuple)) and len(given) > 0 and all(isinstance(row, (list, tuple)) for row in given)
    return Corpus.from_token_ids(given) if ids else Corpus.load(given)


def _key(document: Document) -> str | tuple[int, ...]:
    return document.text if document.token_ids is None else document.token_ids


def _corpus(pairs: Sequence[tuple[Document, str]]) -> Corpus:
    names = [label for _, label in pairs]
    if pairs[0][0].token_ids is not None:
        return Corpus.from_token_ids([d.token_ids or () for d, _ in pairs], labels=names)
    return Corpus.load([{"text": document.text, "label": label} for document, label in pairs])
