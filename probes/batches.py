"""From documents to numbered batches: tokenised, split at the context, padded at one side."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moescope.core.errors import InputError
from moescope.core.json_data import to_json
from moescope.core.text import whole_characters
from moescope.probes.corpus import Corpus, Document
from moescope.probes.corpus_files import BadRecord

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Sequence:
    """One row of a batch: a document, or a part of one.

    Attributes:
        sequence_id: 0-based, in corpus order after splitting.
        document: the document it is from, and `document_id` its number.
        part: which part of the document.
        text: the text of the part.
        token_ids: its ids, special tokens included.
    """

    sequence_id: int
    document_id: int
    document: Document
    part: int
    text: str
    token_ids: NDArray[np.int64]

    @property
    def content_hash(self) -> str:
        """SHA-256 over the token ids."""
        return hashlib.sha256(self.token_ids.astype("<i8").tobytes()).hexdigest()

    @property
    def metadata_json(self) -> str | None:
        """Every other field of the document as JSON, None where there is none."""
        if not self.document.metadata:
            return None
        return whole_characters(to_json(self.document.metadata))


@dataclass(frozen=True)
class Batch:
    """Sequences that run together; the unit of work.

    Attributes:
        number: 0-based place in the plan.
        sequences: its rows.
        characters: characters of corpus read up to its end, for progress.
    """

    number: int
    sequences: tuple[Sequence, ...]
    characters: int

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Unmasked tokens of each row."""
        return np.array([len(s.token_ids) for s in self.sequences])

    @property
    def tokens(self) -> int:
        """Unmasked tokens."""
        return int(self.lengths.sum())

    def padded(self, pad_id: int, *, side: Side = "right") -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Token ids [row, position] padded at one side, and the mask of real tokens."""
        lengths = self.lengths
        columns = np.arange(lengths.max())[None, :]
        mask = columns >= lengths.max() - lengths[:, None] if side == "left" else columns < lengths[:, None]
        ids = np.full(mask.shape, pad_id, dtype=np.int64)
        ids[mask] = np.concatenate([s.token_ids for s in self.sequences])
        return ids, mask

    def spans(self, *, side: Side = "right") -> list[tuple[int, int]]:
        """Which of the row · position places hold real tokens once padded: first and one past the last, joined where they meet.

        Example:
            >>> text = Document("", None, "", {})
            >>> rows = [Sequence(n, n, text, 0, "", np.zeros(length, np.int64)) for n, length in enumerate((3, 3, 2))]
            >>> found = Batch(0, tuple(rows), 0)
            >>> found.spans()
            [(0, 8)]
            >>> found.spans(side="left")
            [(0, 6), (7, 9)]
        """
        lengths, width = self.lengths, int(self.lengths.max())
        found: list[tuple[int, int]] = []
        for row, length in enumerate(map(int, lengths)):
            first = (row + 1) * width - length if side == "left" else row * width
            if found and found[-1][1] == first:
                found[-1] = (found[-1][0], first + length)
            else:
                found.append((first, first + length))
        return found


@dataclass
class BatchPlan:
    """Cuts a corpus into batches by corpus order, batch size and maximum length alone.

    Attributes:
        corpus: what is read.
        tokenizer: None for a corpus of token ids.
        batch_size: sequences a batch.
        max_length: tokens of the longest sequence.
        vocabulary: how many token ids the model has; an id beyond them is refused.
        split_documents, single_tokens: counted while walking: documents split into parts, sequences of one token.
    """

    corpus: Corpus
    tokenizer: Any
    batch_size: int
    max_length: int
    vocabulary: int | None = None
    split_documents: int = field(default=0, init=False)
    single_tokens: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[Batch]:
        self.split_documents = self.single_tokens = 0
        rows: list[Sequence] = []
        number = characters = 0
        for sequence in self._sequences():
            rows.append(sequence)
            characters += len(sequence.text) or len(sequence.token_ids)
            if len(rows) == self.batch_size:
                yield Batch(number, tuple(rows), characters)
                number, rows = number + 1, []
        if rows:
            yield Batch(number, tuple(rows), characters)

    def _sequences(self) -> Iterator[Sequence]:
        sequence_id = document_id = 0
        for document in self.corpus.documents():
            if isinstance(document, BadRecord):
                continue
            parts = list(self._parts(document))
            self.split_documents += len(parts) > 1
            for part, (text, ids) in enumerate(parts):
                self.single_tokens += len(ids) == 1
                if self.vocabulary is not None and max(ids) >= self.vocabulary:
                    raise InputError(
                        f"document {document_id} has a token id that the model does not have",
                        expected=f"ids from 0 to {self.vocabulary - 1:,}",
                        found=f"{max(ids):,}",
                        fix="use the tokenizer that belongs to the model",
                    )
                yield Sequence(sequence_id, document_id, document, part, text, np.array(ids, dtype=np.int64))
                sequence_id += 1
            document_id += 1

    def _parts(self, document: Document) -> Iterator[tuple[str, list[int]]]:
        if document.token_ids is not None:
            ids = list(document.token_ids)
            yield from (("", ids[start : start + self.max_length]) for start in range(0, len(ids), self.max_length))
            return
        if self.tokenizer is None:
            raise InputError(
                "this corpus has texts, but the model has no tokenizer",
                fix="pass tokenizer=… to load, or use Corpus.from_token_ids",
            )
        fast = bool(self.tokenizer.is_fast)
        options = {"add_special_tokens": False, "verbose": False}
        ids = list(self.tokenizer(document.text, **options)["input_ids"])
        before, after = self._special_ids
        room = self.max_length - len(before) - len(after)
        if room < 1:
            raise InputError(
                f"a max_length of {self.max_length} leaves no room beside the tokenizer's {len(before) + len(after)} special tokens",
                fix="raise max_length (--max-length)",
            )
        if len(ids) <= room:
            if whole := [*before, *ids, *after]:
                yield document.text, whole
            return
        offsets = (
            self.tokenizer(document.text, return_offsets_mapping=True, **options)["offset_mapping"] if fast else []
        )
        for start in range(0, len(ids), room):
            end = min(start + room, len(ids))
            if fast:
                stop = offsets[end][0] if end < len(ids) else len(document.text)
                text = document.text[offsets[start][0] if start else 0 : stop]
            else:
                text = self.tokenizer.decode(ids[start:end])
            yield text, [*before, *ids[start:end], *after]

    @cached_property
    def _special_ids(self) -> tuple[list[int], list[int]]:
        """Ids the tokenizer puts before and after a text."""
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return whole[:start], whole[start + len(plain) :]
        return [], []
