"""`Corpus`: labelled documents, streamed from where they lie, so that a corpus may be larger than memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moescope.core.errors import InputError
from moescope.core.text import whole_characters
from moescope.probes.corpus_files import READERS, BadRecord, Record

_DEEPEST = 100  # levels of lists and objects in a record's fields


@dataclass(frozen=True)
class Document:
    """One text of a corpus.

    Attributes:
        text: the text; empty where only token ids are known.
        label: its group, for instance a domain; None where it has none.
        source: where it comes from.
        metadata: every other field it came with.
        token_ids: given ids, which are then used as they are; None to let the model's tokenizer make them.
    """

    text: str
    label: str | None = None
    source: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class CorpusFacts:
    """What one pass over a corpus finds.

    Attributes:
        documents, characters: how many.
        labels: label → documents.
        fingerprint: SHA-256 over texts, ids and labels, in order.
        skipped: records left out because they could not be read.
        first_skipped: why the first of them could not.
    """

    documents: int
    characters: int
    labels: Mapping[str, int]
    fingerprint: str
    skipped: int
    first_skipped: str | None


class Corpus:
    """Documents that can be walked again and again, in one order, without holding them in memory.

    Args:
        records: a function that starts a new walk over the records.
        name: what to call the corpus in messages.
        text_field, label_field: which fields of a record are text and label.
        skip_bad_lines: leave out records that cannot be read, and count them, instead of stopping at the first.

    Raises:
        InputError: by `load`, and on the way by whatever walks it: a record that cannot be read, with its line.

    Example:
        >>> import moescope as ms
        >>> corpus = ms.Corpus.load(["First text.", {"text": "Zweiter Text.", "label": "german"}])
        >>> [document.label for document in corpus]
        [None, 'german']
    """

    def __init__(
        self,
        records: Callable[[], Iterable[Record | BadRecord]],
        *,
        name: str,
        text_field: str = "text",
        label_field: str = "label",
        skip_bad_lines: bool = False,
    ) -> None:
        self._records = records
        self.name = name
        self._text_field, self._label_field = text_field, label_field
        self._skip = skip_bad_lines
        self._facts: CorpusFacts | None = None

    @classmethod
    def load(
        cls, source: Any, *, text_field: str = "text", label_field: str = "label", skip_bad_lines: bool = False
    ) -> Corpus:
        """Read a corpus from a file, a folder, a list or a dataset.

        Args:
            source: "demo" for the bundled labelled corpus; a .jsonl, .csv, .parquet or .txt file; a folder of such files (a
                file's own folder is its label where it lies in a subfolder); a list of texts or of dicts; a
                `datasets.Dataset`.
            text_field, label_field: names of the fields or columns.
            skip_bad_lines: count records that cannot be read instead of stopping at the first.

        Raises:
            InputError: nothing there, nothing readable, or a record without text (with its line).
        """
        options: dict[str, Any] = {
            "text_field": text_field,
            "label_field": label_field,
            "skip_bad_lines": skip_bad_lines,
        }
        if source == "demo":
            from moescope.probes.demo import CORPUS_PATH

            source = CORPUS_PATH
        if isinstance(source, (str, Path)):
            path = Path(source)
            return cls(_path_records(path), name=str(path), **options)
        if isinstance(source, Corpus):
            return source
        if isinstance(source, Sequence) or (hasattr(source, "__iter__") and hasattr(source, "features")):
            return cls(lambda: _item_records(source), name=type(source).__name__, **options)
        raise InputError(
            "this is not a corpus",
            expected="a path, a list of texts or dicts, or a datasets.Dataset",
            found=type(source).__name__,
            fix="turn a generator into a list, or write it to a .jsonl file",
        )

    @classmethod
    def from_token_ids(cls, sequences: Sequence[Sequence[int]], *, labels: Sequence[str] | None = None) -> Corpus:
        """A corpus of given token ids; needs no tokenizer, and nothing is added to the ids."""
        if labels is not None and len(labels) != len(sequences):
            raise InputError(
                "every sequence needs a label", expected=f"{len(sequences)} labels", found=str(len(labels))
            )
        names: Sequence[str | None] = labels or [None] * len(sequences)
        rows = [{"token_ids": tuple(map(int, ids)), "label": name} for ids, name in zip(sequences, names, strict=True)]
        return cls(lambda: _item_records(rows), name=f"{len(rows)} sequences of token ids")

    def __iter__(self) -> Iterator[Document]:
        return (document for document in self.documents() if isinstance(document, Document))

    def documents(self) -> Iterator[Document | BadRecord]:
        """Documents in order, with unreadable records in their place where they are to be skipped."""
        for record in self._records():
            document = self._document(record)
            if isinstance(document, BadRecord) and not self._skip:
                raise InputError(
                    f"{document.where} {document.problem}",
                    expected=f"a record with a text in {self._text_field!r}",
                    fix="mend it, or leave such records out and count them: skip_bad_lines=True (--skip-bad-lines)",
                )
            yield document

    def facts(self) -> CorpusFacts:
        """Walk the corpus once: counts, labels, fingerprint. Finds every unreadable record before a model runs."""
        if self._facts is None:
            self._facts = self._scan()
        return self._facts

    def _scan(self) -> CorpusFacts:
        digest, labels = hashlib.sha256(), dict[str, int]()
        documents = characters = skipped = 0
        first_skipped = None
        for document in self.documents():
            if isinstance(document, BadRecord):
                skipped += 1
                first_skipped = first_skipped or f"{document.where} {document.problem}"
                continue
            documents += 1
            characters += len(document.text) or len(document.token_ids or ())
            if document.label is not None:
                labels[document.label] = labels.get(document.label, 0) + 1
            for part in (document.label, document.text, document.token_ids):
                encoded = repr(part).encode("utf-8", "surrogatepass")
                digest.update(len(encoded).to_bytes(8, "little"))
                digest.update(encoded)
        if not documents:
            raise InputError(
                f"the corpus {self.name} is empty",
                found=f"{skipped} records, none readable: {first_skipped}" if skipped else "no documents",
                fix="pass a corpus with at least one text",
            )
        return CorpusFacts(documents, characters, labels, digest.hexdigest(), skipped, first_skipped)

    def _document(self, record: Record | BadRecord) -> Document | BadRecord:
        if isinstance(record, BadRecord):
            return record
        fields = dict(record.fields)
        ids = fields.pop("token_ids", None)
        text = fields.pop(self._text_field, None)
        label = fields.pop(self._label_field, None)
        if ids is not None and not _are_token_ids(ids):
            return BadRecord(record.where, "has token ids that are not a list of whole numbers from 0 up")
        if ids is not None:
            return (
                Document("", _name(label), record.where, fields, tuple(ids))
                if ids
                else BadRecord(record.where, "has no token ids")
            )
        if wrong := self._wrong(text, record.fields):
            return BadRecord(record.where, wrong)
        source = fields.pop("source", None)
        where = whole_characters(str(source)) if source is not None else record.where
        return Document(whole_characters(text), _name(label), where, fields)

    def _wrong(self, text: Any, fields: Mapping[str, Any]) -> str | None:
        """Why a record is no text, as the end of a sentence; None where it is one."""
        if text is None:
            return f"has no text: its fields are {', '.join(map(repr, fields)) or 'no fields'}"
        if not isinstance(text, str):
            return f"has a {type(text).__name__} as text"
        if not text.strip("\ufeff \t\r\n"):
            return "has an empty text"
        return f"nests deeper than {_DEEPEST} levels" if _deeper(fields, _DEEPEST) else None

    def __repr__(self) -> str:
        counted = f", {self._facts.documents:,} documents" if self._facts else ""
        return f"Corpus({self.name!r}{counted})"

    def _repr_html_(self) -> str:
        from moescope.probes.corpus_display import corpus_html

        return corpus_html(self, self._facts)


def _name(label: Any) -> str | None:
    return None if label is None else whole_characters(str(label))


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects lie in each other deeper than so many levels."""
    if not isinstance(value, (Mapping, list, tuple)):
        return False
    inner = value.values() if isinstance(value, Mapping) else value
    return levels == 0 or any(_deeper(item, levels - 1) for item in inner)


def _are_token_ids(ids: Any) -> bool:
    return isinstance(ids, (list, tuple)) and all(
        isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids
    )


def _item_records(items: Iterable[Any]) -> Iterator[Record | BadRecord]:
    for index, item in enumerate(items):
        where = f"item {index}"
        if isinstance(item, str):
            yield Record(where, {"text": item})
        elif isinstance(item, Mapping):
            yield Record(where, dict(item))
        else:
            yield BadRecord(where, f"is a {type(item).__name__}, not a text or a dict")


def _path_records(path: Path) -> Callable[[], Iterator[Record | BadRecord]]:
    if not os.path.exists(path):  # unlike Path.exists, False also for names that no system can hold
        raise InputError(
            f"there is no corpus at {path}",
            fix="check the path; a corpus is a .jsonl, .csv, .parquet or .txt file, or a folder of them",
        )
    if path.is_file():
        return _reader(path)
    if not path.is_dir():
        raise InputError(f"{path} is no file", found="a pipe or a device", fix="write the texts to a file first")
    files = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix.lower() in READERS)
    if not files:
        raise InputError(f"{path} holds no corpus files", expected=f"files ending in {', '.join(READERS)}")

    def walk() -> Iterator[Record | BadRecord]:
        for file in files:
            for record in _reader(file)():
                if isinstance(record, Record) and file.parent != path:
                    yield Record(record.where, {"label": file.parent.relative_to(path).as_posix(), **record.fields})
                else:
                    yield record

    return walk


def _reader(path: Path) -> Callable[[], Iterator[Record | BadRecord]]:
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise InputError(
            f"cannot read {path} as a corpus",
            expected=f"a file ending in {', '.join(READERS)}",
            found=path.suffix or "no ending",
        )

    def walk() -> Iterator[Record | BadRecord]:
        try:
            yield from read(path)
        except OSError as refused:
            raise InputError(f"cannot read {path}", found=str(refused.strerror or refused)) from refused

    return walk
