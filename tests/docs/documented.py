"""What the pages hold: their code blocks, links and anchors, read from the Markdown."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
RUN = ("python", "console")  # kinds of blocks that tests run
_FENCE = re.compile(r"^(?P<indent> *)(?P<marks>`{3,})(?P<kind>[\w+-]*)\s*$")
_SKIP = re.compile(r"^\s*<!-- not run: (?P<reason>.+?) -->\s*$")
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]\n]*(?:\n[^\]\n]*)?)\]\((?P<target>[^)\s]+)(?: \"[^\"]*\")?\)")
_ANCHOR = re.compile(r"<a (?:id|name)=\"([^\"]+)\"")


@dataclass(frozen=True)
class Block:
    """A code block of a page.

    Attributes:
        page: the file.
        line: of its first line of code, 1-based.
        kind: what it is tagged.
        code: its text, without the indent of its fence.
        reason: why it is not run; None where it is.
    """

    page: Path
    line: int
    kind: str
    code: str
    reason: str | None

    @property
    def where(self) -> str:
        """`docs/start.md:12`."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The commands of a console block, each on one line; what it prints is left out."""
        found, going_on = [], False
        for line in self.code.splitlines():
            if going_on:
                found[-1] += " " + line.strip().rstrip("\\").strip()
            elif line.startswith("$ "):
                found.append(line[2:].rstrip("\\").strip())
            else:
                continue
            going_on = line.endswith("\\")
        return found


def written_pages() -> list[Path]:
    """README and every page of docs, in order."""
    return [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page, in order."""
    found: list[Block] = []
    reason: str | None = None
    lines = iter(enumerate(page.read_text(encoding="utf-8").splitlines(), 1))
    for number, line in lines:
        if skip := _SKIP.match(line):
            reason = skip["reason"]
        elif fence := _FENCE.match(line):
            code = []
            for _, inner in lines:
                if inner.strip() == fence["marks"]:
                    break
                code.append(inner.removeprefix(fence["indent"]))
            found.append(Block(page, number + 1, fence["kind"], "\n".join(code) + "\n", reason))
            reason = None
        elif line.strip():
            reason = None
    return found


def prose(page: Path) -> str:
    """The page without its code."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"^( *)(`{3,}).*?^\1\2\s*$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "code", text)


def links(page: Path) -> list[tuple[bool, str]]:
    """Whether it is a picture, and where it leads: every link of a page."""
    return [(bool(m["image"]), m["target"]) for m in _LINK.finditer(prose(page))]


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as code hosts and the built pages make them, and those it names itself."""
    found: dict[str, int] = {}
    named = set(_ANCHOR.findall(page.read_text(encoding="utf-8")))
    in_code = False
    for line in page.read_text(encoding="utf-8").splitlines():
        if _FENCE.match(line) or line.strip().startswith("```"):
            in_code = not in_code
        if not in_code and (heading := re.match(r"#{1,6} (.+)", line)):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).replace("`", "").replace("\\", "")
            slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
            count = found.get(slug, 0)
            named.add(f"{slug}-{count}" if count else slug)
            found[slug] = count + 1
    return named


def words_of(command: str) -> list[str]:
    """A command split as a shell splits it, comments left out."""
    return shlex.split(command, comments=True)
