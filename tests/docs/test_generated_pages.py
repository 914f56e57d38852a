"""Pages that are written from the source are what the source says, and name everything there is."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import moescope as ms


@pytest.fixture(scope="module")
def generate() -> Iterator[Callable[[str], ModuleType]]:
    """`generate("errors_page")`: a module of docs/generate."""
    folder = str(Path(__file__).resolve().parents[2] / "docs" / "generate")
    before = set(sys.modules)
    sys.path.insert(0, folder)
    yield importlib.import_module
    sys.path.remove(folder)
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(folder):
            del sys.modules[name]


@pytest.mark.parametrize("name", ["analyses", "api", "edits", "errors", "probes", "store"])
def test_page_is_what_its_command_writes(name: str, generate: Any, documented: ModuleType) -> None:
    pages = generate("pages").PAGES
    written = (documented.DOCS / f"{name}.md").read_text(encoding="utf-8")
    assert written.rstrip("\n") == pages[name]().rstrip("\n"), f"write it anew: python docs/generate/pages.py {name}"


def test_every_generated_page_is_compared(generate: Any) -> None:
    compared = test_page_is_what_its_command_writes.pytestmark[0].args[1]  # type: ignore[attr-defined]  # pytest's mark
    assert set(generate("pages").PAGES) == set(compared)


@pytest.mark.slow
def test_the_command_writes_the_page(tmp_path: Path, documented: ModuleType) -> None:
    copy = tmp_path / "docs" / "generate"
    copy.mkdir(parents=True)
    for source in (documented.DOCS / "generate").glob("*.py"):
        (copy / source.name).write_bytes(source.read_bytes())
    subprocess.run([sys.executable, str(copy / "pages.py"), "api"], check=True, capture_output=True)
    assert (copy.parent / "api.md").read_bytes() == (documented.DOCS / "api.md").read_bytes()


def test_every_public_name_has_an_entry(documented: ModuleType) -> None:
    headings = set(re.findall(r"^##+ (\S+)$", (documented.DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert {f"ms.{name}" for name in ms.__all__} <= headings
    assert {f"edits.{name}" for name in ms.edits.__all__} <= headings
    assert {f"sae.{name}" for name in ms.sae.__all__} <= headings


def test_entries_show_what_help_shows(documented: ModuleType) -> None:
    page = (documented.DOCS / "api.md").read_text(encoding="utf-8")
    entry = page.split("\n## ms.record\n")[1].split("\n## ")[0]
    for parameter in ("probes", "generate", "batch_size", "budget", "resume"):
        assert re.search(rf"^    {parameter}: ", entry, re.MULTILINE), parameter  # in the signature
        assert f"`{parameter}`" in entry  # and described


def test_every_analysis_has_its_page(documented: ModuleType) -> None:
    there = {path.stem for path in (documented.DOCS / "methods").glob("*.md")} - {"index"}
    assert set(ms.analyses()["name"]) <= there


def _patterns(documented: ModuleType) -> list[re.Pattern[str]]:
    """The problems of the page of errors, … standing for anything."""
    page = (documented.DOCS / "errors.md").read_text(encoding="utf-8")
    texts = [
        re.sub(r"\\(.)", r"\1", text) for text in re.findall(r"^- \*\*(.+?)\*\* \(`\w+`, exit code", page, re.MULTILINE)
    ]
    loose = [re.escape(text).replace("…", ".*") for text in texts if re.sub(r"[…\W]", "", text)]
    return [re.compile(text, re.DOTALL) for text in loose]


def _provoked(tmp_path: Path) -> dict[str, Callable[[], object]]:
    """Mistakes that a user makes."""
    (tmp_path / "folder").mkdir()
    other = tmp_path / "other.txt"
    other.write_text("no database")
    return {
        "a model that is not there": lambda: ms.load(str(tmp_path / "no.gguf")),
        "a folder without a model": lambda: ms.load(str(tmp_path / "folder")),
        "no model at all": lambda: ms.load(3),  # type: ignore[arg-type]  # the mistake is the point
        "a device that is not there": lambda: ms.load("demo", device="tpu7"),
        "a dtype that is none": lambda: ms.load("demo", dtype="float3"),
        "a corpus that is not there": lambda: ms.Corpus.load(tmp_path / "no.jsonl"),
        "a file that is no store": lambda: ms.Store(other),
        "a store that is not there": lambda: ms.Store(tmp_path / "no.duckdb", read_only=True),
        "an edit of a layer before the first": lambda: ms.edits.Ablate(layer=-1, experts=[0]),
        "an edit of another kind of number": lambda: ms.edits.Ablate(layer="three", experts=[0]),  # type: ignore[arg-type]
        "an edit in a way that is none": lambda: ms.edits.Ablate(layer=1, experts=[0], how="gently"),  # type: ignore[arg-type]
        "an intervention of something else": lambda: ms.Intervention.from_json("[1, 2"),
        "a layer class that is none": lambda: ms.register_moe(3, lambda *_: None, n_experts=1, top_k=1),  # type: ignore[arg-type, return-value]
        "a report of another kind": lambda: ms.write_report([], tmp_path / "report.pdf"),
    }


def test_errors_that_users_meet_are_on_the_page(documented: ModuleType, tmp_path: Path) -> None:
    patterns = _patterns(documented)
    assert len(patterns) > 500
    for mistake, make in _provoked(tmp_path).items():
        with pytest.raises(ms.MoescopeError) as refused:
            make()
        assert any(p.fullmatch(refused.value.problem) for p in patterns), f"{mistake}: {refused.value.problem}"


def test_a_message_that_nobody_wrote_is_not_found(documented: ModuleType) -> None:
    assert not any(p.fullmatch("the moon is out of cheese") for p in _patterns(documented))


def test_messages_of_troubleshooting_are_real(documented: ModuleType) -> None:
    page = (documented.DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    known = re.sub(r"\\(.)", r"\1", (documented.DOCS / "errors.md").read_text(encoding="utf-8"))
    told = [m for line in re.findall(r"^\*\*(.+)\*\*$", page, re.MULTILINE) for m in re.findall(r"`([^`]{16,})`", line)]
    assert len(told) >= 12
    for message in told:
        words = [part.strip(" '") for part in re.split(r"…|'\w+'", message.removeprefix("error: "))]
        assert any(all(part in line for part in words) for line in known.splitlines()), message


def test_source_reader_finds_every_kind_of_wording(generate: Any, tmp_path: Path) -> None:
    source = tmp_path / "moescope" / "made.py"
    source.parent.mkdir()
    source.write_text(
        '''
class OwnError(StoreError):
    pass

def f(name, many):
    """Does it."""
    reason = f"{name} is no {'number' if many else 'name'}"
    if many:
        raise InputError(reason, expected="one" if name else "two", fix="try " "again")
    raise OwnError(f"cannot open {name!r}", found=str(many))

def g(text):
    """Says what g says."""
    return RunError(text)
'''
    )
    found = generate("error_sources").raised_in(tmp_path)
    assert {(e.problem, e.expected, e.fix, e.kind) for e in found} == {
        ("… is no number", "one", "try again", "InputError"),
        ("… is no number", "two", "try again", "InputError"),
        ("… is no name", "one", "try again", "InputError"),
        ("… is no name", "two", "try again", "InputError"),
        ("cannot open …", "", "", "StoreError"),
        ("…", "", "", "RunError"),
    }
    assert [e.about for e in found if e.problem == "…"] == ["Says what g says."]
