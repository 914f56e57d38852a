"""Reads the ten domains out of their packages, as cleaned documents that know source and licence."""

from __future__ import annotations

import gzip
import platform
import re
import struct
import subprocess
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moescope.probes.demo.packages import Package
from moescope.probes.demo.roff import page_text

MANUAL_LANGUAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "german": ("de", ("manpages-de", "manpages-de-dev")),
    "french": ("fr", ("manpages-fr", "manpages-fr-dev")),
    "spanish": ("es", ("manpages-es", "manpages-es-dev")),
    "japanese": ("ja", ("manpages-ja", "manpages-ja-dev")),
    "chinese": ("zh_CN", ("manpages-zh",)),
}
"""Domain to the folder of its language and its packages of manual pages."""

UNCLEAR_LICENSE = "LicenseRef-as-in-the-original-page"

_CHINESE_EXCEPTIONS = {
    "kill.1.gz": "GPL-2.0-only",
    "intro.6.gz": "GPL-2.0-or-later",
    "epoll.7.gz": "GPL-2.0-or-later",
}
_BIBLE_INDEX_START, _BIBLE_INDEX_END = 0x5C, 0x170
_COMPRESS_MAGIC = b"\x1f\x9d\x90"
_NAMES_A_PERSON = re.compile(
    r"[\w.+-]+@[\w-]+\.\w|copyright|©|\(c\) (?:19|20)\d\d|SPDX-License|all rights reserved", re.I
)
_WORDNET_LEMMA = re.compile(r"\(\w+\)$")
_SYNSETS_A_DOCUMENT = 12


@dataclass(frozen=True)
class Document:
    """One text with its label, its source (``package=version:path``) and its licence in SPDX words."""

    domain: str
    text: str
    source: str
    license: str


def clean(text: str) -> str:
    """`text` without paragraphs that hold a mail address or copyright notice, or runs of blank lines."""
    paragraphs = re.split(r"\n\s*\n", text.replace("\r", "").expandtabs(8))
    kept = [p.rstrip() for p in paragraphs if p.strip() and not _NAMES_A_PERSON.search(p)]
    return "\n\n".join("\n".join(line.rstrip() for line in p.split("\n")) for p in kept).strip("\n")


def read_manual(domain: str, packages: dict[str, Package]) -> Iterator[Document]:
    """Manual pages of one language, a page a document."""
    language, names = MANUAL_LANGUAGES[domain]
    for package in (packages[name] for name in names):
        for path in sorted((package.root / "usr/share/man" / language).rglob("*.gz")):
            if path.is_symlink():
                continue
            source = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
            text = page_text(source)
            if text and "\ufffd" not in text:
                yield Document(domain, clean(text), package.identity(path), manual_license(domain, path, source))


def manual_license(domain: str, path: Path, source: str) -> str:
    """The licence of a page: what its package says, or, for Japanese, what its own comments say.

    The Japanese package leaves each page under its original's licence; a page that does not state a licence
    known here is `UNCLEAR_LICENSE`, and never becomes part of the shipped corpus.
    """
    if domain == "chinese":
        return _CHINESE_EXCEPTIONS.get(path.name, "GFDL-1.2-or-later")
    if domain != "japanese":
        return "GPL-3.0-or-later"
    head = " ".join(line[3:].strip() for line in source.splitlines() if line.startswith(('.\\"', "'\\\"")))
    if re.search(r"GNU General Public License|\bGPL", head):
        if "any later version" in head:
            return "GPL-2.0-or-later"
        return "GPL-2.0-only" if re.search(r"[Vv]ersion 2|GPL-?v?2", head) else "GPL-1.0-or-later"
    return "Linux-man-pages-copyleft" if "verbatim copies" in head else UNCLEAR_LICENSE


def decompress_window(window: bytes) -> bytes:
    """One window of compress(1) data; gzip still reads that format."""
    command = ["gzip", "-dc"]
    return subprocess.run(command, input=_COMPRESS_MAGIC + window, check=True, capture_output=True).stdout  # noqa: S603  a fixed command


def read_bible(package: Package) -> Iterator[Document]:
    """The King James Bible, a chapter a document; the file holds compress(1) windows without their magic."""
    path = package.root / "usr/lib/bible.data"
    data = path.read_bytes()
    index = data[_BIBLE_INDEX_START:_BIBLE_INDEX_END]
    starts = struct.unpack(f">{len(index) // 4}I", index)
    windows = zip(starts, (*starts[1:], len(data) + len(_COMPRESS_MAGIC)), strict=True)
    text = b"".join(decompress_window(data[start:end]) for start, end in windows).decode("utf-8")
    chapters: dict[str, list[str]] = {}
    for reference, verse in re.findall(r"^(\w+):\d+ (.*)$", text, re.MULTILINE):
        chapters.setdefault(reference, []).append(verse)
    for reference, verses in chapters.items():
        source = f"{package.identity(path)}#{reference}"
        yield Document("bible", "\n".join(verses), source, "public-domain")


def read_dictionary(package: Package) -> Iterator[Document]:
    """WordNet's entries (words, then definition and examples), a dozen neighbouring entries a document."""
    kinds = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}
    for path in sorted((package.root / "usr/share/wordnet").glob("data.*")):
        entries: list[str] = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("  ") or " | " not in line:
                continue
            fields, gloss = line.split(" | ", 1)
            words = fields.split(" ")
            lemmas = [words[4 + 2 * i].replace("_", " ") for i in range(int(words[3], 16))]
            names = ", ".join(_WORDNET_LEMMA.sub("", lemma) for lemma in lemmas)
            entries.append(f"{names} ({kinds[words[2]]}): {gloss.strip()}")
        for start in range(0, len(entries), _SYNSETS_A_DOCUMENT):
            source = f"{package.identity(path)}#{start // _SYNSETS_A_DOCUMENT}"
            yield Document("dictionary", "\n".join(entries[start : start + _SYNSETS_A_DOCUMENT]), source, "WordNet-3.0")


def read_perl(package: Package) -> Iterator[Document]:
    """Perl's own manual, a pod file a document, formatting codes stripped; change logs are left out."""
    for path in sorted((package.root / "usr/share/perl").rglob("*.pod")):
        if re.search(r"delta|perlhist|perltoc|perlartistic|perlgpl", path.stem):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        text = re.sub(r"^=(?:begin|for|encoding)\b[^\n]*\n?", "", text, flags=re.MULTILINE)
        text = re.split(r"^=head1 (?:AUTHORS?|ACKNOWLEDGE|COPYRIGHT|HISTORY)", text, flags=re.MULTILINE)[0]
        text = re.sub(r"^=(?:head\d|item) *|^=(?:over|back|cut|end|pod)\b.*$", "", text, flags=re.MULTILINE)
        text = re.sub(r"[BCFIXSL]<<+ (.*?) >>+", r"\1", text, flags=re.DOTALL)
        for _ in range(2):  # formatting codes nest
            text = re.sub(r"X<[^<>]*>|Z<>", "", text)
            text = re.sub(r"[BCFISL]<(?:([^<>|]*)\|[^<>]*|([^<>]*))>", r"\1\2", text)
        text = text.replace("E<gt>", ">").replace("E<lt>", "<")
        yield Document("perl", clean(text), package.identity(path), "GPL-1.0-or-later OR Artistic-1.0-Perl")


def read_kernel(package: Package) -> Iterator[Document]:
    """The kernel's English documentation in reStructuredText, a file a document."""
    root = package.root / f"usr/share/doc/{package.name}/Documentation"
    for path in sorted(root.rglob("*.rst.gz")) + sorted(root.rglob("*.rst")):
        if "translations" in path.parts or path.is_symlink():
            continue
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = raw.decode("utf-8", errors="replace")
        identifier = re.search(r"SPDX-License-Identifier: *(.+?) *(?:\*/)?$", text, re.MULTILINE)
        license_name = identifier.group(1).strip() if identifier else "GPL-2.0-only"
        text = re.sub(r"^:(?:Author|Date|Maintainer|Contact|Translator)\w*:.*\n", "", text, flags=re.M | re.I)
        yield Document("kernel", clean(text), package.identity(path), license_name)


def read_python() -> Iterator[Document]:
    """The running interpreter's standard library, a module a document, without tests and bundled packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {
        "site-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "ensurepip",
        "__pycache__",
        "encodings",
    }
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if left_out & set(relative.parts) or "pydoc_data" in relative.parts or path.stem.startswith("_sysconfigdata"):
            continue
        text = clean(path.read_text(encoding="utf-8", errors="replace"))
        source = f"python={platform.python_version()}:Lib/{relative.as_posix()}"
        yield Document("python", text, source, "PSF-2.0")


def read_documents(packages: dict[str, Package]) -> Iterator[Document]:
    """Every document of every domain, in a fixed order."""
    yield from read_bible(packages["bible-kjv-text"])
    yield from read_dictionary(packages["wordnet-base"])
    yield from read_kernel(packages["linux-doc-6.1"])
    yield from read_perl(packages["perl-doc"])
    yield from read_python()
    for domain in MANUAL_LANGUAGES:
        yield from read_manual(domain, packages)
