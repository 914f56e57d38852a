"""A written report read back: every piece of text with the place where it stands."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from moescope.core.errors import InputError
from moescope.report.html_page import MANIFEST
from moescope.report.markdown_page import MANIFEST_BEGINS, MANIFEST_ENDS

UNSEEN = ("link", "look", "script", "style")
"""Places of pieces that a reader does not see as text."""
_VOID = {"meta", "br", "img", "link", "input", "hr"}


@dataclass(frozen=True)
class Piece:
    """A piece of a report.

    Attributes:
        section: anchor of the section it stands in.
        place: where in it, in words.
        text: what is written there.
    """

    section: str
    place: str
    text: str


def manifest_of(path: Path) -> dict[str, Any]:
    """What a report says of itself; raises `InputError` where the file is no report of ours."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as missing:
        raise InputError(f"there is no file {path}", fix="check the path") from missing
    except (OSError, UnicodeDecodeError) as unreadable:
        raise _no_report(path, "a file that cannot be read as text") from unreadable
    begin, end = (
        (MANIFEST_BEGINS, MANIFEST_ENDS)
        if path.suffix == ".md"
        else (f"<script type='application/json' id='{MANIFEST}'>", "</script>")
    )
    at = text.rfind(begin)
    if at < 0:
        raise _no_report(path, "no provenance of results in it")
    written = text[at + len(begin) :].split(end, 1)[0]
    try:
        found = json.loads(written)
    except (json.JSONDecodeError, RecursionError) as broken:
        raise _no_report(path, "provenance that cannot be read") from broken
    if not isinstance(found, dict) or not isinstance(found.get("runs"), list) or "format" not in found:
        raise _no_report(path, "provenance that is not of a report")
    return found


def _no_report(path: Path, found: str) -> InputError:
    return InputError(
        f"{path} is no report that can be checked", expected="a file that moescope report wrote, .html or .md", found=found,
        fix="write the report again: moescope report STORE RUN --output report.html",
    )  # fmt: skip


def pieces_of(text: str, *, markdown: bool) -> list[Piece]:
    """Everything that a report shows, its figures' data included, in order."""
    if markdown:
        return _markdown(text)
    reader = _Reader()
    reader.feed(text)
    reader.close()
    return reader.pieces


class _Reader(HTMLParser):
    """Collects pieces: text by heading, table row and column; the data of figures whole; numbers that tables sort by."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[Piece] = []
        self._section = ""
        self._open: list[str] = []
        self._columns: list[str] = []
        self._row = self._column = 0
        self._in_head = False
        self._label = ""
        self._script: str | None = None
        self._text = ""
        self._place = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._flush()
        given = dict(attrs)
        if tag in ("section", "h1", "h2") and given.get("id"):
            self._section = str(given["id"])
        if tag == "table":
            self._columns, self._row = [], 0
        if tag == "thead":
            self._in_head = True
        if tag == "tr":
            self._row, self._column, self._label = self._row + (not self._in_head), 0, ""
        if tag in ("td", "th"):
            self._column += 1
            if "data-v" in given:
                self.pieces.append(
                    Piece(self._section, f"{self._cell()}, the number it is sorted by", str(given["data-v"]))
                )
        self._unseen(tag, given)
        if tag == "script":
            self._script = str(given.get("id") or "") if given.get("type") == "application/json" else ""
        if tag not in _VOID:
            self._open.append(tag)

    def _unseen(self, tag: str, given: dict[str, str | None]) -> None:
        """What no text shows, but decides what is shown where: links, the figure of a place and its size, scripts, styles."""
        if "href" in given:
            self.pieces.append(Piece(self._section, "link", str(given["href"])))
        if "data-figure" in given or "style" in given:
            self.pieces.append(Piece(self._section, "look", f"{given.get('data-figure')}, {given.get('style')}"))
        if tag in ("script", "style") and "main" in self._open:
            self.pieces.append(Piece(self._section, tag, str(given.get("id"))))

    def handle_endtag(self, tag: str) -> None:
        self._flush()
        if tag == "thead":
            self._in_head = False
        if tag == "script":
            self._script = None
        while self._open and self._open.pop() != tag:
            continue

    def handle_data(self, data: str) -> None:
        self._text += data

    def _flush(self) -> None:
        text, self._text = self._text, ""
        if self._script is not None:
            if self._script.startswith("figure-") and self._script != "figure-library":
                self.pieces.append(Piece(self._section, "figure", text))
            return
        shown = " ".join(text.split())
        if not shown or "style" in self._open:
            return
        if "td" in self._open or "th" in self._open:
            if self._in_head:
                self._columns.append(shown)
            elif self._column == 1:
                self._label = shown
            self.pieces.append(Piece(self._section, self._cell(), shown))
            return
        kinds = {
            "h1": "title",
            "h2": "title",
            "p": "text",
            "summary": "text",
            "pre": "query",
            "nav": "contents",
            "title": "title",
        }
        place = next((kinds[tag] for tag in reversed(self._open) if tag in kinds), "text")
        self.pieces.append(Piece(self._section, place, shown))

    def _cell(self) -> str:
        if self._in_head:
            return f"name of column {self._column}"
        column = self._columns[self._column - 1] if self._column <= len(self._columns) else str(self._column)
        label = f" ({self._label[:40]})" if self._label and self._column > 1 else ""
        return f"table row {self._row}{label}, column {column}"


_ANCHOR = re.compile(r"<a id='([^']*)'></a>$")
_SPLIT = re.compile(r"(?<!\\)\|")


def _markdown(text: str) -> list[Piece]:
    pieces: list[Piece] = []
    section, columns, row = "", list[str](), 0
    for line in text.splitlines():
        if line.startswith(MANIFEST_BEGINS) or not line.strip():
            columns, row = ([], 0) if not line.strip() else (columns, row)
            continue
        if found := _ANCHOR.match(line):
            section = found[1]
        elif line.startswith("| "):
            cells = [part.strip() for part in _SPLIT.split(line)[1:-1]]
            row += 1
            if row == 1:
                columns = cells
            for number, one in enumerate(cells):
                column = columns[number] if number < len(columns) else str(number + 1)
                label = f" ({cells[0][:40]})" if number else ""
                place = f"name of column {number + 1}" if row == 1 else f"table row {row - 2}{label}, column {column}"
                pieces.append(Piece(section, place, one))
        else:
            pieces.append(Piece(section, "title" if line.startswith("#") else "text", line))
    return pieces
