from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.dashboard.token_text import PieceReader, visible


def read(*tokens: bytes) -> list[str | None]:
    return PieceReader(dict(enumerate(tokens))).read(range(len(tokens)))


def test_a_character_shows_at_the_token_that_completes_it() -> None:
    assert read(b"a\xe6", b"\x97", b"\xa5", "本".encode()) == ["a", None, "日", "本"]
    assert read(b"\xf0\x9f", b"\x99", b"\x82!") == [None, None, "🙂!"]


def test_a_token_may_complete_one_character_and_begin_the_next() -> None:
    assert read(b"\xe6\x97", b"\xa5\xe6", b"\x9c\xac") == [None, "日", "本"]


@given(st.text(st.characters(exclude_categories=["Cs", "Cc", "Cf", "Zl", "Zp"]), min_size=1, max_size=60), st.data())
def test_pieces_put_together_are_the_text(text: str, data: st.DataObject) -> None:
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(raw) - 1)), max_size=12)))
    tokens = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True) if a < b]
    assert "".join(piece or "" for piece in read(*tokens)) == text


@given(st.lists(st.binary(max_size=8), max_size=20))
def test_any_bytes_give_one_entry_a_token_and_no_control_characters(tokens: list[bytes]) -> None:
    shown = read(*tokens)
    assert len(shown) == len(tokens)
    assert not any(
        (ord(c) < 0x20 and c != "\n") or 0x7F <= ord(c) < 0xA0 or 0x202A <= ord(c) < 0x202F
        for piece in shown
        for c in piece or ""
    )


def test_bytes_that_are_no_text_show_as_replacement_characters() -> None:
    assert read(b"\xff", b"a") == ["\ufffd", "a"]
    assert read(b"a", b"\xe6\x97") == ["a", "\ufffd"], "a character still open at the end"


def test_ids_without_bytes_show_as_numbers() -> None:
    assert PieceReader({}).read([7, None]) == ["[7]", "[?]"]


def test_an_open_character_does_not_leak_into_the_next_sequence() -> None:
    reader = PieceReader({0: b"\xe6\x97", 1: b"\xa5"})
    reader.read([0])
    assert reader.read([1]) == ["\ufffd"]


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("\n", "↵\n"),
        ("a\n\n  b", "a↵\n↵\n  b"),
        ("\x00", "␀"),
        ("\t", "␉"),
        ("\x7f", "␡"),
        ("\u202eabc", "⟨202E⟩abc"),
        ("\u200b", "⟨200B⟩"),
        ("\u2028", "⟨2028⟩"),
        ("", "⟨⟩"),
        ("क्‍ष", "क्‍ष"),
    ],
)
def test_what_cannot_be_seen_is_named(raw: str, shown: str) -> None:
    assert visible(raw) == shown


def test_a_token_by_itself_shows_its_bytes_where_they_are_part_of_a_character() -> None:
    reader = PieceReader({0: b" the", 1: b"\xe6\x97", 2: b"x" * 1000})
    assert [reader.alone(i) for i in (0, 1, 3)] == [" the", "⟨E6 97⟩", "[3]"]
    assert reader.alone(2).endswith("… (1,000 characters)")
