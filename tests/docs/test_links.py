"""No link of README, docs or docstrings leads nowhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from types import ModuleType
from urllib.parse import urlsplit

_FOLDERS = ("moescope", "store", "probes", "routing", "sae", "dashboard")
_NAMED_PAGE = re.compile(r"\bdocs/[\w/-]+\.(?:md|ipynb|png)\b")


def _problems(page: Path, target: str, documented: ModuleType) -> str | None:
    """What is wrong with a link, None where it leads somewhere."""
    if re.match(r"[a-z][a-z0-9+.-]*:", target):
        parts = urlsplit(target)
        whole = parts.scheme == "mailto" or (parts.scheme in ("http", "https") and "." in parts.netloc)
        return None if whole else "not a well-formed address"
    path, _, anchor = target.partition("#")
    aim = (page.parent / path).resolve() if path else page
    if not aim.exists():
        return "no such file"
    if not aim.is_relative_to(documented.ROOT):
        return "outside of the project"
    if anchor and (aim.suffix != ".md" or anchor not in documented.anchors(aim)):
        return "no such heading"
    return None


def test_every_link_leads_somewhere(page: Path, documented: ModuleType) -> None:
    wrong = {
        target: problem
        for _, target in documented.links(page)
        if (problem := _problems(page, target, documented)) is not None
    }
    assert not wrong


def test_pictures_are_pictures(page: Path, documented: ModuleType) -> None:
    for picture, target in documented.links(page):
        if picture and "://" not in target:
            assert (page.parent / target).read_bytes()[:4] in (b"\x89PNG", b"<svg"), target


def test_dead_links_would_be_found(documented: ModuleType) -> None:
    page = documented.DOCS / "edits.md"
    assert _problems(page, "edits.md#ablate", documented) is None
    assert _problems(page, "#ablate", documented) is None
    assert _problems(page, "edits.md#no-such-edit", documented) == "no such heading"
    assert _problems(page, "nowhere.md", documented) == "no such file"
    assert _problems(page, "https://", documented) == "not a well-formed address"


def _texts(path: Path) -> list[str]:
    """Docstrings and messages of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_pages_that_the_source_names_are_there(documented: ModuleType) -> None:
    for folder in _FOLDERS:
        for path in (documented.ROOT / folder).rglob("*.py"):
            for text in _texts(path):
                for named in _NAMED_PAGE.findall(text):
                    if not (documented.ROOT / named).parent.is_dir():
                        continue  # a page of another project
                    assert (documented.ROOT / named).exists(), f"{path.relative_to(documented.ROOT)}: {named}"


def test_no_page_is_an_orphan(documented: ModuleType) -> None:
    """From the first page every other can be reached by links."""
    reached, waiting = set(), [documented.DOCS / "index.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        if page.suffix == ".md":
            for _, target in documented.links(page):
                aim = (page.parent / target.partition("#")[0]).resolve()
                if "://" not in target and aim.suffix in (".md", ".ipynb") and aim.exists():
                    waiting.append(aim)
    pages = {
        p for p in documented.DOCS.rglob("*") if p.suffix in (".md", ".ipynb") and ".ipynb_checkpoints" not in str(p)
    }
    assert not {str(page.relative_to(documented.ROOT)) for page in pages - reached}
