"""Files turned hostile byte by byte: cut, doubled, overwritten, with lengths that claim more than there is."""

from __future__ import annotations

import random

# Byte strings that readers of text and of binary formats trip over.
NASTY = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xff" * 8, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f",
    (2**63 - 1).to_bytes(8, "little"), (100 << 20).to_bytes(4, "little"), (100 << 20).to_bytes(8, "big"), b"\n\r\n\r",
    b'"', b'\\ud800', b"[" * 3000, b"{" * 3000, b'{"a":' * 1500, b"9" * 5000, b"NaN", b"-Infinity", b"1e999", b",", b"\x1a",
    b"PAR1", b"PK\x03\x04", b"\x93NUMPY", b"\x80\x04", b"c", b"R", b"0", b"\x1b[31m",
)  # fmt: skip


def broken(raw: bytes, dice: random.Random, *, other: bytes = b"") -> bytes:
    """A copy with one to six changes.

    Args:
        raw: a file that is whole.
        dice: draws the changes.
        other: a file of which pieces may be put in.
    """
    data = bytearray(raw)
    for _ in range(dice.choice((1, 1, 1, 2, 3, 6))):
        _CHANGES[dice.randrange(len(_CHANGES))](data, dice, other)
    return bytes(data)


def _span(data: bytearray, dice: random.Random, most: int = 64) -> slice:
    start = dice.randrange(len(data) + 1)
    return slice(start, min(len(data), start + dice.randint(1, most)))


def _flip(data: bytearray, dice: random.Random, _: bytes) -> None:
    if data:
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def _cut(data: bytearray, dice: random.Random, _: bytes) -> None:
    del data[_span(data, dice)]


def _end_early(data: bytearray, dice: random.Random, _: bytes) -> None:
    del data[dice.randrange(len(data) + 1) :]


def _double(data: bytearray, dice: random.Random, _: bytes) -> None:
    piece = data[_span(data, dice, 400)]
    place = dice.randrange(len(data) + 1)
    data[place:place] = piece * dice.choice((1, 2, 20))


def _insert(data: bytearray, dice: random.Random, _: bytes) -> None:
    place = dice.choice((0, len(data), dice.randrange(len(data) + 1)))
    data[place:place] = dice.choice(NASTY)


def _overwrite(data: bytearray, dice: random.Random, _: bytes) -> None:
    nasty = dice.choice(NASTY)
    place = dice.randrange(len(data) + 1)
    data[place : place + len(nasty)] = nasty


def _noise(data: bytearray, dice: random.Random, _: bytes) -> None:
    span = _span(data, dice)
    data[span] = dice.randbytes(span.stop - span.start)


def _splice(data: bytearray, dice: random.Random, other: bytes) -> None:
    if other:
        start = dice.randrange(len(other))
        place = dice.randrange(len(data) + 1)
        data[place : place + dice.randint(0, 200)] = other[start : start + dice.randint(1, 400)]


_CHANGES = (_flip, _flip, _cut, _end_early, _double, _insert, _insert, _overwrite, _overwrite, _noise, _splice)
