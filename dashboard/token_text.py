"""Tokens as readable text: characters that are spread over several byte-level tokens are joined again."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping

CONTINUES = "\N{MIDDLE DOT}"
"""Stands for a token whose bytes are the beginning or middle of a character; shown in its own style."""

_NEWLINE = "↵\n"
_BIDI = dict.fromkeys([0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)])
_INVISIBLE = {0x00AD, 0x200B, 0x200C, 0x200D, 0x2028, 0x2029, 0x2060, 0xFEFF} | set(_BIDI)
_CONTROL = {code: chr(0x2400 + code) for code in range(0x20) if code != 0x0A} | {0x7F: "␡"}
_CONTROL |= {code: f"⟨{code:02X}⟩" for code in range(0x80, 0xA0)}
_VISIBLE = str.maketrans({code: f"⟨{code:04X}⟩" for code in (*_BIDI, 0x2028, 0x2029)} | _CONTROL | {0x0A: _NEWLINE})


def visible(text: str) -> str:
    """Text as the token view shows it: line breaks as ↵ with a break, control and direction characters as their names.

    Example:
        >>> visible("a\\n\\x00")
        'a↵\\n␀'
    """
    if not text:
        return "⟨⟩"
    if all(ord(character) in _INVISIBLE for character in text):
        return "".join(f"⟨{ord(character):04X}⟩" for character in text)
    return text.translate(_VISIBLE)


def brief(text: str, limit: int = 120) -> str:
    """Text on one line, and where it is long its beginning with how long it is.

    Example:
        >>> brief("x" * 1000, limit=4)
        'xxxx… (1,000 characters)'
    """
    line = text.replace("\n", "")
    return line if len(line) <= limit else f"{line[:limit]}… ({len(line):,} characters)"


class PieceReader:
    """Shows the tokens of sequences, given the bytes behind each token id."""

    def __init__(self, vocabulary: Mapping[int, bytes]) -> None:
        self._vocabulary = vocabulary
        self._whole: dict[int, str | None] = {}

    def read(self, ids: Iterable[int | None]) -> list[str | None]:
        """What each token of one sequence shows; None for a token whose bytes do not yet complete a character.

        A character that is spread over several tokens is shown at the token that completes it. Bytes that are no UTF-8, and
        a character still open at the end of the sequence, show as U+FFFD. Ids that the run has no bytes for show as numbers.

        Example:
            >>> PieceReader({0: b"a\\xe6", 1: b"\\x97", 2: b"\\xa5"}).read([0, 1, 2])
            ['a', None, '日']
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        shown: list[str | None] = []
        between = True  # no character is open
        for token_id in ids:
            raw = None if token_id is None else self._vocabulary.get(token_id)
            if raw is None:
                shown.append(decoder.decode(b"", final=True) + f"[{'?' if token_id is None else token_id}]")
                decoder.reset()
                between = True
                continue
            if between and (whole := self._alone(token_id, raw)) is not None:
                shown.append(whole)
                continue
            text = decoder.decode(raw)
            between = not decoder.getstate()[0]
            shown.append(visible(text) if text else None)
        if shown and (rest := decoder.decode(b"", final=True)):
            shown[-1] = (shown[-1] or "") + rest
        return shown

    def alone(self, token_id: int) -> str:
        """A token by itself, on one line: its text, its bytes where they are part of a character, its id where it has none.

        Example:
            >>> PieceReader({0: b"a", 1: b"\\xe6\\x97"}).alone(1)
            '⟨E6 97⟩'
        """
        raw = self._vocabulary.get(token_id)
        if raw is None:
            return f"[{token_id}]"
        text = self._alone(token_id, raw)
        return brief(text) if text is not None else f"⟨{raw[:16].hex(' ').upper()}⟩"

    def whole(self, token_id: int) -> bool:
        """Whether a token shows the same wherever it stands: its bytes are known, and are whole characters."""
        raw = self._vocabulary.get(token_id)
        return raw is not None and self._alone(token_id, raw) is not None

    def piece(self, token_id: int) -> str | None:
        """What a token shows that is whole by itself; None for any other."""
        raw = self._vocabulary.get(token_id)
        return None if raw is None else self._alone(token_id, raw)

    def _alone(self, token_id: int | None, raw: bytes) -> str | None:
        """What a token shows that is whole by itself; None where its bytes need their neighbours."""
        if token_id is None:
            return None
        if token_id not in self._whole:
            try:
                self._whole[token_id] = visible(raw.decode("utf-8"))
            except UnicodeDecodeError:
                self._whole[token_id] = None
        return self._whole[token_id]
