"""Markup is stripped readably, and no longer line stands on both sides of the split."""

from __future__ import annotations

from moescope.probes.demo.domains import Document, clean
from moescope.probes.demo.roff import page_text
from moescope.probes.demo.sources import is_heldout, pieces, split_documents

PAGE = r""".\" Copyright 2000, somebody
.TH LS 1 "2022" "GNU" "Commands"
.SH NAME
ls \- list \fIdirectory\fP contents
.SH OPTIONS
.TP
.BR \-a ", " \-\-all
do not ignore entries
starting with .
.PP
A line \(em with \(lqquotes\(rq.
.nf
  kept   as it is
.fi
.TS
l l.
a	table
.TE
.SH AUTHOR
Written by somebody.
.SH "SEE ALSO"
\fBdir\fP(1)
"""

PAGE_TEXT = """NAME
ls - list directory contents

OPTIONS

-a, --all
do not ignore entries starting with .

A line — with “quotes”.
  kept   as it is

SEE ALSO
dir(1)"""


def test_manual_page_becomes_readable_text_without_its_author() -> None:
    assert page_text(PAGE) == PAGE_TEXT


def test_page_that_only_includes_another_is_refused() -> None:
    assert page_text(".TH A 1\n.so man1/b.1\n") is None
    assert page_text(".Dd today\n.Sh NAME\n") is None


def test_east_asian_lines_join_without_a_space() -> None:
    assert page_text(".TH A 1\n.SH 名前\n文件を\n読む\nfile\nを") == "名前\n文件を読む file を"


def test_cleaning_drops_addresses_and_notices() -> None:
    text = "Kept.\n\nCopyright 2001 somebody\n\nwrite to a@b.org\n\n\n\nAlso   kept.  "
    assert clean(text) == "Kept.\n\nAlso   kept."


def _word(document: int, position: int) -> str:
    """A word of its own; letters, because digits are levelled before texts are compared."""
    return "".join(chr(ord("a") + int(digit)) for digit in f"{document:03}{position:02}")


def _documents() -> list[Document]:
    shared = "This very sentence about a shared matter is long enough to be noticed by the split."
    return [
        Document(
            "one",
            f"{' '.join(_word(i, j) for j in range(40))}.\n\n{shared if i % 3 == 0 else 'Else.'}",
            f"package=1:file{i}",
            "none",
        )
        for i in range(200)
    ]


def test_no_piece_is_on_both_sides_of_the_split() -> None:
    training, heldout = split_documents(_documents())
    assert 4 < len(heldout) < 40
    assert training
    seen = set().union(*(pieces(d.text) for d in heldout))
    assert seen
    assert all(seen.isdisjoint(pieces(d.text)) for d in training)
    assert all(is_heldout(d.source) for d in heldout)
    assert not any(is_heldout(d.source) for d in training)


def test_a_package_update_moves_no_document_across() -> None:
    for i in range(100):
        assert is_heldout(f"package=1:2.3-4:usr/file{i}") == is_heldout(f"package=5.6:usr/file{i}")


def test_exact_duplicates_are_dropped() -> None:
    documents = _documents()
    again = [Document("one", d.text, d.source + "copy", "none") for d in documents]
    training, heldout = split_documents(documents + again)
    assert len(training) + len(heldout) <= len(documents)
