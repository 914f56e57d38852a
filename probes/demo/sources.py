"""Collects the demo text: documents of ten domains, deduplicated, held-out ones kept apart.

    python -m moescope.probes.demo.sources --cache FOLDER

writes ``train.jsonl`` and ``heldout.jsonl`` into the cache folder and ``packages.json`` beside them. Whole
documents are held out, by a seeded hash of their source; then every training paragraph that shares a longer
line or sentence with a held-out document is dropped, and a training document that loses half its text that
way is dropped as a whole.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import platform
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from moescope.probes.demo.domains import Document, read_documents
from moescope.probes.demo.packages import DEFAULT_CACHE, fetch_packages

logger = logging.getLogger(__name__)

SPLIT_SEED = 20240
HELDOUT_SHARE = 0.08
MIN_CHARACTERS = 150
MAX_HELDOUT_CHARACTERS = 100_000  # a longer document stays in training: held out, it would starve a small domain
_MIN_PIECE_LATIN, _MIN_PIECE_CJK = 40, 16
_CJK = re.compile(r"[\u3000-\u30ff\u4e00-\u9fff]")


def digest(text: str) -> int:
    """A 64-bit hash that does not change between runs."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def is_heldout(source: str) -> bool:
    """Whether the document of this identity is held out: a seeded hash of its name decides.

    Manual pages, files and chapters are judged without package version, so an update moves no document
    across.
    """
    name = re.sub(r"=[^:]*(?::\d[^:]*)?:", ":", source, count=1)
    return digest(f"{SPLIT_SEED}|{name}") / 2**64 < HELDOUT_SHARE


def pieces(text: str) -> set[int]:
    """Hashes of the text's longer lines and sentences, with case, digits and spacing levelled."""
    found: set[int] = set()
    for piece in re.split(r"\n|(?<=[.;:!?]) |(?<=[。；！？])", text):
        levelled = re.sub(r"\W+", " ", re.sub(r"\d+", "0", piece.lower())).strip()
        if len(levelled) >= (_MIN_PIECE_CJK if _CJK.search(levelled) else _MIN_PIECE_LATIN):
            found.add(digest(levelled))
    return found


def drop_shared_paragraphs(document: Document, heldout_pieces: set[int]) -> Document | None:
    """`document` without paragraphs sharing a piece with held-out text; None if half of it or more goes."""
    paragraphs = document.text.split("\n\n")
    kept = [p for p in paragraphs if heldout_pieces.isdisjoint(pieces(p))]
    text = "\n\n".join(kept)
    if len(text) < MIN_CHARACTERS or len(text) * 2 <= len(document.text):
        return None
    return Document(document.domain, text, document.source, document.license)


def split_documents(documents: Iterable[Document]) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents: exact duplicates dropped, no longer line or sentence on both sides."""
    seen: set[int] = set()
    training: list[Document] = []
    heldout: list[Document] = []
    for document in documents:
        key = digest(re.sub(r"\W+", "", document.text))
        if len(document.text) < MIN_CHARACTERS or key in seen:
            continue
        seen.add(key)
        short = len(document.text) <= MAX_HELDOUT_CHARACTERS
        (heldout if short and is_heldout(document.source) else training).append(document)
    heldout_pieces: set[int] = set()
    for document in heldout:
        heldout_pieces |= pieces(document.text)
    disjoint = (drop_shared_paragraphs(document, heldout_pieces) for document in training)
    return [document for document in disjoint if document is not None], heldout


def write_documents(documents: Iterable[Document], path: Path) -> None:
    """One JSON object a line, in UTF-8."""
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps(asdict(document), ensure_ascii=False) + "\n")


def load_documents(path: Path) -> list[Document]:
    """The documents that `write_documents` wrote."""
    with path.open(encoding="utf-8") as file:
        return [Document(**json.loads(line)) for line in file]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: collect, split and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder for packages and collected text")
    cache: Path = parser.parse_args(arguments).cache
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    packages = fetch_packages(cache)
    training, heldout = split_documents(read_documents(packages))
    write_documents(training, cache / "train.jsonl")
    write_documents(heldout, cache / "heldout.jsonl")
    versions = {package.name: package.version for package in packages.values()} | {"python": platform.python_version()}
    (cache / "packages.json").write_text(json.dumps(versions, indent=1) + "\n", encoding="utf-8")
    for side, documents in (("training", training), ("held-out", heldout)):
        number, characters = Counter(d.domain for d in documents), Counter[str]()
        for document in documents:
            characters[document.domain] += len(document.text)
        for domain in sorted(number):
            logger.info("%-9s %-11s %5d documents %9d characters", side, domain, number[domain], characters[domain])


if __name__ == "__main__":
    main()
