"""What a token stands for: its bytes, its text, its class."""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
CLASSES = ("special", "space", "punctuation", "digit", "word", "fragment", "mixed")


class Pieces:
    """Bytes, text and class of token ids, looked up once an id; without a tokenizer nothing is known of them.

    Args:
        tokenizer: a transformers tokenizer, or None.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids) if tokenizer is not None else set()
        # By token id, grown as ids come: class, −1 where not looked up yet; and whether its row was given out.
        self._class = np.empty(0, np.int8)
        self._written = np.empty(0, bool)

    def describe(self, ids: NDArray[np.int64]) -> tuple[NDArray[np.bool_], pa.Array]:
        """Whether each id is special, and its class (null without a tokenizer)."""
        if self._tokenizer is None:
            return np.zeros(len(ids), bool), pa.nulls(len(ids), pa.string())
        self._grow(ids)
        codes = self._class[ids]
        if (codes < 0).any():
            for fresh in map(int, np.unique(ids[codes < 0])):
                self._class[fresh] = self._class_of(fresh)
            codes = self._class[ids]
        return codes == CLASSES.index("special"), pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(CLASSES))

    def unseen(self, ids: NDArray[np.integer[Any]]) -> pa.Table:
        """Rows of `vocabulary` for ids that were not asked for before."""
        fresh: list[int] = []
        if self._tokenizer is not None:
            self._grow(ids)
            fresh = [int(i) for i in np.unique(ids[~self._written[ids]])]
            self._written[fresh] = True
        raw = [token_bytes(self._tokenizer, i) for i in fresh]
        return pa.table(
            {
                "token_id": pa.array(fresh, pa.int32()),
                "bytes": pa.array(raw, pa.binary()),
                "text": pa.array([b.decode("utf-8", "replace") for b in raw], pa.string()),
            }
        )

    def _grow(self, ids: NDArray[np.integer[Any]]) -> None:
        more = int(ids.max(initial=-1)) + 1 - len(self._class)
        if more > 0:
            self._class = np.concatenate([self._class, np.full(more, -1, np.int8)])
            self._written = np.concatenate([self._written, np.zeros(more, bool)])

    def _class_of(self, token_id: int) -> int:
        special = token_id in self._special
        return CLASSES.index("special" if special else classify(token_bytes(self._tokenizer, token_id)))


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """The bytes a token stands for, whatever way its tokenizer spells them.

    Knows byte pieces (`<0x0A>`), the byte alphabet of byte-level tokenizers, and the leading-space mark of SentencePiece.
    An id the tokenizer does not have gives empty bytes.
    """
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if piece is None:
        return b""
    if isinstance(piece, bytes):
        return piece
    if byte := _BYTE_PIECE.fullmatch(piece):
        return bytes([int(byte[1], 16)])
    text = str(tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False))
    if "\ufffd" in text and all(character in _byte_alphabet() for character in piece):
        return bytes(_byte_alphabet()[character] for character in piece)
    if piece.startswith("\u2581") and not text.startswith(" "):
        text = " " + text
    return text.encode("utf-8", "replace")


def classify(raw: bytes) -> str:
    """Class of a token by the characters it holds: space, punctuation, digit, word, fragment (part of a character) or mixed.

    Example:
        >>> classify(b" the"), classify(b"42"), classify(b"),")
        ('word', 'digit', 'punctuation')
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return "fragment"
    kinds = {_kind(character) for character in text if not character.isspace()}
    if not kinds:
        return "space"
    return kinds.pop() if len(kinds) == 1 else "mixed"


def _kind(character: str) -> str:
    category = unicodedata.category(character)
    if category[0] in "LM":
        return "word"
    return "digit" if category[0] == "N" else "punctuation"


@cache
def _byte_alphabet() -> dict[str, int]:
    """Character → byte of byte-level tokenizers: printable Latin-1 stands for itself, the rest starts at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
