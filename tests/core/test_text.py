"""Text from outside: nothing lost but what would steer the text around it."""

from __future__ import annotations

import html
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.core.text import escaped, printable, undirected, whole_characters

# Unicode's own list: explicit directional formatting characters (UAX #9, section 2) and the implicit marks.
DIRECTION = [
    chr(code) for code in range(0x110000) if unicodedata.bidirectional(chr(code)) in {"LRE", "RLE", "LRO", "RLO", "PDF"}
]
DIRECTION += [
    chr(code) for code in range(0x110000) if unicodedata.bidirectional(chr(code)) in {"LRI", "RLI", "FSI", "PDI"}
]


@pytest.mark.parametrize("mark", [*DIRECTION, "\u200e", "\u200f", "\u061c"], ids=lambda mark: f"U+{ord(mark):04X}")
def test_every_mark_of_direction_is_shown_and_not_obeyed(mark: str) -> None:
    assert undirected(f"a{mark}b") == "a\ufffdb"


@given(st.text())
def test_other_text_stays_as_it_is(text: str) -> None:
    if not set(text) & {*DIRECTION, "\u200e", "\u200f", "\u061c"}:
        assert undirected(text) == text
        assert html.unescape(escaped(text)) == html.unescape(html.escape(text))


# ECMA-48: the controls that a terminal obeys lie in C0, DEL and C1; line and tab are what text needs of them.
@pytest.mark.parametrize("code", [*range(0x20), *range(0x7F, 0xA0)], ids=lambda code: f"U+{code:04X}")
def test_no_control_reaches_a_terminal_but_line_and_tab(code: int) -> None:
    assert printable(f"a{chr(code)}b") == (f"a{chr(code)}b" if code in (0x09, 0x0A) else "a\ufffdb")


def test_letters_of_every_script_reach_a_terminal() -> None:
    assert printable("naïve — Straße, 中文, אב, é") == "naïve — Straße, 中文, אב, é"


@given(st.text(alphabet="<>&\"'ab/ ="))
def test_escaped_text_has_no_markup_and_reads_back(text: str) -> None:
    shown = escaped(text)
    assert not set(shown) & set("<>\"'")
    assert html.unescape(shown) == text


@given(st.text(alphabet=st.characters(codec=None, categories=None)))
def test_whole_characters_can_be_written_by_anyone(text: str) -> None:
    whole = whole_characters(text)
    assert whole.encode("utf-8").decode("utf-8") == whole
    if not any(unicodedata.category(character) == "Cs" for character in text):
        assert whole == text


def test_pairs_of_surrogates_become_the_character_they_mean() -> None:
    assert whole_characters("a\ud83e\uddeab") == "a🧪b"
    assert whole_characters("caf\udce9") == "caf\ufffd"
