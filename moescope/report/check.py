"""Every number of a report against its store: the report is computed again from what it says of itself, and compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, get_args
from urllib.parse import quote

from moescope.core.errors import InputError, StoreError
from moescope.core.versions import VERSION
from moescope.report.compose import FORMAT, Part, compose
from moescope.report.document import Document
from moescope.report.html_page import html_page
from moescope.report.markdown_page import markdown_page
from moescope.report.read_back import UNSEEN, Piece, manifest_of, pieces_of
from moescope.report.thresholds.rules import Rules
from moescope.store.run import Run
from moescope.store.store import Store

UNCHECKED = {
    ".html": "Not checked: the figure library, the style sheet and the script of the page; rows of tables beyond those shown.",
    ".md": "Not checked: what the images show (their files are compared with checksums taken when they were written); rows of "
    "tables beyond those shown.",
}


@dataclass(frozen=True)
class Difference:
    """One place where a report and its store disagree."""

    section: str
    place: str
    report: str
    store: str


@dataclass(frozen=True)
class Checked:
    """What a check found.

    Attributes:
        path: the report.
        pieces: texts, cells and figures compared.
        numbers: how many of their characters' runs are numbers.
        differences: where report and store disagree.
        notes: what a reader must know besides.
    """

    path: Path
    pieces: int
    numbers: int
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]


def check_report(path: Path, *, store: Path | None = None, tell: Callable[[str], None] | None = None) -> Checked:
    """Compute a report again from its store and compare everything it shows.

    Args:
        path: a report that `write_report` wrote, HTML or Markdown.
        store: look for its runs here, where the store has moved.
        tell: called with the name of what is computed.

    Raises:
        InputError: the file is no report, or its store or a run of it is gone.
    """
    manifest = manifest_of(path)
    if manifest["format"] != FORMAT:
        raise InputError(
            f"{path} was written in another format of reports",
            expected=f"format {FORMAT}",
            found=f"format {manifest['format']}, by moescope {manifest.get('moescope')}",
        )
    try:
        return _checked(manifest, path, store, tell)
    except (KeyError, TypeError, AttributeError) as broken:
        raise InputError(f"{path} has provenance that cannot be read", found=str(broken)) from broken


def _checked(
    manifest: Mapping[str, Any], path: Path, store: Path | None, tell: Callable[[str], None] | None
) -> Checked:
    if manifest["part"] not in get_args(Part):
        raise InputError(f"{path} has provenance that cannot be read", found=f"part {manifest['part']!r}")
    with ExitStack() as stack:
        runs = _runs(manifest, path, store, stack)
        rules = Rules.from_data(manifest["thresholds"]) if manifest.get("thresholds") else None
        stores = {entry["run_id"]: entry["named"] for entry in manifest["runs"]}
        document = compose(runs, part=manifest["part"], rules=rules, stores=stores, tell=tell).document
        again = _written(document, manifest, path)
    markdown = path.suffix == ".md"
    mine, theirs = (pieces_of(text, markdown=markdown) for text in (path.read_text(encoding="utf-8"), again))
    differences = [*_provenance(manifest, document.manifest), *_compared(mine, theirs), *_images(manifest, path)]
    numbers = sum(_count(piece.text) for piece in mine if piece.place not in UNSEEN)
    return Checked(path, len(mine), numbers, tuple(differences), tuple(_notes(manifest, path)))


def _runs(manifest: Mapping[str, Any], path: Path, given: Path | None, stack: ExitStack) -> list[Run]:
    """The runs of a report, found again by their ids."""
    opened: dict[Path, Store] = {}
    runs = []
    for entry in manifest["runs"]:
        own = _where(Path(entry["store"]), path)
        place = own if given is None else given
        known = _opened(place, opened, stack).runs()
        found = next((run for run in known if run.run_id == entry["run_id"]), None)
        if found is None and given is not None and own.exists():
            # Of a report over several stores, one may have moved and another not.
            others = _opened(own, opened, stack).runs()
            found = next((run for run in others if run.run_id == entry["run_id"]), None)
        if found is None:
            same = any(run.name == entry["name"] for run in known)
            raise InputError(
                f"run {entry['name']!r} of this report is gone from {place}",
                expected=f"run_id {entry['run_id']}",
                found="another run of that name" if same else "no such run",
                fix="write the report again, or name the store that has the run: moescope report STORE --check FILE",
            )
        runs.append(found)
    return runs


def _opened(place: Path, opened: dict[Path, Store], stack: ExitStack) -> Store:
    """A store of the report, opened once."""
    key = place.resolve()
    if key not in opened:
        try:
            opened[key] = stack.enter_context(Store(place, read_only=True))
        except StoreError as gone:
            raise InputError(
                f"the store of this report cannot be opened: {gone.problem}",
                found=str(place),
                fix="name it, where it has moved: moescope report STORE --check FILE",
            ) from gone
    return opened[key]


def _where(store: Path, report: Path) -> Path:
    """The store as named; beside the report, where both were moved together."""
    beside = report.resolve().parent / store.name
    return store if store.exists() or not beside.exists() else beside


def _written(document: Document, manifest: Mapping[str, Any], path: Path) -> str:
    if path.suffix != ".md":
        return html_page(document)
    folder = quote(f"{path.stem}_files")
    return markdown_page(document, {anchor: f"{folder}/{anchor}.png" for anchor in manifest.get("images", {})})


def _compared(mine: list[Piece], theirs: list[Piece]) -> Iterator[Difference]:
    """Differences, aligned section by section so that a missing row does not shift what follows."""
    own = [(piece.section, piece.place) for piece in mine]
    known = [(piece.section, piece.place) for piece in theirs]
    if own == known:
        for one, other in zip(mine, theirs, strict=True):
            yield from _piece(one, other)
        return
    for kind, a, b, c, d in SequenceMatcher(None, own, known, autojunk=False).get_opcodes():
        if kind == "equal":
            for one, other in zip(mine[a:b], theirs[c:d], strict=True):
                yield from _piece(one, other)
        elif kind == "replace" and b - a == d - c:
            for one, other in zip(mine[a:b], theirs[c:d], strict=True):
                if one.text != other.text:
                    yield Difference(one.section, one.place, one.text, other.text)
        else:
            yield from (Difference(p.section, p.place, p.text, "nothing") for p in mine[a:b])
            yield from (Difference(p.section, p.place, "nothing", p.text) for p in theirs[c:d])


def _piece(one: Piece, other: Piece) -> Iterator[Difference]:
    if one.text == other.text:
        return
    if one.place == "figure":
        yield from _figures(one, other)
        return
    yield Difference(one.section, one.place, one.text, other.text)


def _figures(one: Piece, other: Piece) -> Iterator[Difference]:
    try:
        found, right = json.loads(one.text), json.loads(other.text)
    except (json.JSONDecodeError, RecursionError):
        yield Difference(one.section, "figure", "data that cannot be read", "the data of a figure")
        return
    for where, mine, theirs in _leaves(found, right, ""):
        yield Difference(one.section, f"figure, {where}", mine, theirs)


def _leaves(mine: Any, theirs: Any, where: str) -> Iterator[tuple[str, str, str]]:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in dict.fromkeys([*mine, *theirs]):
            yield from _leaves(mine.get(key, "nothing"), theirs.get(key, "nothing"), f"{where}.{key}".lstrip("."))
    elif isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            yield from _leaves(a, b, f"{where}[{number}]")
    elif mine != theirs:
        yield where, json.dumps(mine)[:80], json.dumps(theirs)[:80]


def _provenance(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Difference]:
    """What the report says of where its results come from, against what they do come from."""
    for number, (a, b) in enumerate(zip(mine["runs"], theirs["runs"], strict=True), 1):
        for key in ("name", "status"):
            if a[key] != b[key]:
                yield Difference("", f"provenance, {key} of run {number}", str(a[key]), str(b[key]))
    told = [
        [json.dumps(entry, sort_keys=True, default=str) for entry in data.get("results", [])] for data in (mine, theirs)
    ]
    if told[0] == told[1]:
        return
    for a, b in zip(*told, strict=False):
        if a != b:
            yield Difference(json.loads(b)["section"], "provenance", a, b)
    if len(told[0]) != len(told[1]):
        yield Difference("", "provenance", f"{len(told[0])} results", f"{len(told[1])} results")


def _images(manifest: Mapping[str, Any], path: Path) -> Iterator[Difference]:
    for anchor, known in manifest.get("images", {}).items():
        file = path.with_name(f"{path.stem}_files") / f"{anchor}.png"
        found = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "no such file"
        if found != known:
            yield Difference(anchor, f"image {file.name}", found[:16], known[:16])


def _count(text: str) -> int:
    inside, count = False, 0
    for character in text:
        if character.isdigit() and not inside:
            count += 1
        inside = character.isdigit() or (inside and character in ".,")
    return count


def _notes(manifest: Mapping[str, Any], path: Path) -> Iterator[str]:
    if manifest.get("moescope") != VERSION:
        yield f"The report was written by moescope {manifest.get('moescope')}, this is {VERSION}: words may differ for that alone."
    yield UNCHECKED[".md" if path.suffix == ".md" else ".html"]
