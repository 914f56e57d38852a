"""The long texts that needles are hidden in: the user's own corpus, or a bundled text in the public domain."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from moescope.core.errors import InputError
from moescope.probes.corpus import Corpus, Document
from moescope.probes.demo import CORPUS_PATH

# Enough for a handful of long prompts in any script; a corpus may be far larger.
_CHARACTERS = 4_000_000
_PUBLIC_DOMAIN = "bible"  # the one label of the bundled corpus whose passages are all in the public domain


@dataclass(frozen=True)
class Haystack:
    """Texts to take long texts from.

    Attributes:
        name: what they are called in messages.
        passages: the documents, in corpus order.
    """

    name: str
    passages: tuple[str, ...]

    def text(self, first: int, characters: int) -> str:
        """At least so many characters: passages in order from the `first` on, from the front again after the last.

        Example:
            >>> Haystack("two", ("Ann came. ", "Bob left.")).text(1, 12)
            'Bob left.\\n\\nAnn came.'
        """
        taken: list[str] = []
        length = 0
        while length < characters:
            passage = self.passages[(first + len(taken)) % len(self.passages)].strip()
            taken.append(passage)
            length += len(passage) + 2
        return "\n\n".join(taken)

    @property
    def characters(self) -> int:
        """How many it holds before it repeats itself."""
        return sum(map(len, self.passages))


def haystack(corpus: Any = None) -> Haystack:
    """The texts of a corpus, or the bundled ones: 24 passages of the King James Bible.

    Args:
        corpus: anything `Corpus.load` takes; None for the bundled text.

    Raises:
        InputError: a corpus that cannot be read, or one of token ids alone.
    """
    return bundled_haystack() if corpus is None else _held(Corpus.load(corpus))


@lru_cache(maxsize=1)
def bundled_haystack() -> Haystack:
    """The passages of the bundled corpus that are in the public domain.

    Example:
        >>> len(bundled_haystack().passages)
        24
    """
    corpus = Corpus.load(CORPUS_PATH)
    found = tuple(d.text for d in corpus if d.label == _PUBLIC_DOMAIN)
    return Haystack("the bundled King James passages", found)


def _held(corpus: Corpus) -> Haystack:
    passages = tuple(_first(corpus))
    if not passages:
        raise InputError(
            "needles are hidden in texts, and this corpus has none",
            found=corpus.name,
            fix="pass texts instead of token ids, or None for the bundled text",
        )
    return Haystack(corpus.name, passages)


def _first(documents: Iterable[Document]) -> Iterable[str]:
    length = 0
    for document in documents:
        if document.text.strip():
            yield document.text
            length += len(document.text)
        if length >= _CHARACTERS:
            return
