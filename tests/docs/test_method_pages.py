"""One page for each analysis: what is generated is current, what is written by hand is there, formulas parse, commands run."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numpy.typing import NDArray

from moescope.core.analysis import analyses

DOCS = Path(__file__).parents[2] / "docs"
PAGES = DOCS / "methods"
IMAGES = DOCS / "images" / "methods"
HAND = ["Formula", "Chance level and interval", "Traps", "See also"]
NAMES = sorted(entry.name for entry in analyses)
ON_A_CORPUS = ("moescope profile ", "moescope sae study ", "moescope sae steer ", "moescope intervene ")
LARGEST = 60_000  # bytes of a figure


def text_of(name: str) -> str:
    return (PAGES / f"{name}.md").read_text(encoding="utf-8")


def by_hand(name: str) -> dict[str, str]:
    """Heading → text of what people wrote on a page."""
    text = text_of(name)
    first = text[text.index("<!-- end of head -->") : text.index("<!-- use:")]
    last = text[text.index("<!-- end of use -->") :]
    parts = re.split(r"^## (.+)$", first + "\n" + last, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], (part.strip() for part in parts[1::2]), strict=True))


def formulas(text: str) -> Iterator[str]:
    """Every formula of a page; dollars in code are none."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    yield from re.findall(r"\$\$(.+?)\$\$", text, re.DOTALL)
    text = re.sub(r"\$\$.+?\$\$", "", text, flags=re.DOTALL)
    yield from re.findall(r"(?<!\\)\$([^$]+?)(?<!\\)\$", text)


@cache
def converter() -> ModuleType:
    """What turns formulas of the documentation into MathML."""
    spec = importlib.util.spec_from_file_location("docs_mathml", DOCS / "sphinx" / "mathml.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown(formula: str) -> str:
    """A formula as the built documentation shows it."""
    return str(converter().as_mathml(formula, block=False))


def unpacked(image: bytes) -> NDArray[np.uint8]:
    """[row, column, 3] of a picture with a palette whose rows are not filtered."""
    chunks, at = {}, 8
    while at < len(image):
        (length,) = struct.unpack(">I", image[at : at + 4])
        chunks[image[at + 4 : at + 8]] = image[at + 8 : at + 8 + length]
        at += 12 + length
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    palette = np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + width)
    assert not rows[:, 0].any()
    return palette[rows[:, 1:]]


def console_lines(name: str) -> list[str]:
    text = re.sub(r" \\\n\s+", " ", text_of(name))
    return re.findall(r"^\$ (.+)$", text, re.MULTILINE)


def test_every_analysis_has_a_page_and_every_page_an_analysis() -> None:
    assert sorted(path.stem for path in PAGES.glob("*.md") if path.stem not in {"index", "choosing"}) == NAMES


def test_generated_parts_and_index_are_current() -> None:
    checked = subprocess.run(
        [sys.executable, DOCS / "method_pages.py", "--check"], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, f"python docs/method_pages.py would change:\n{checked.stdout}{checked.stderr}"


@pytest.mark.parametrize("name", NAMES)
def test_hand_written_parts_are_there(name: str) -> None:
    written = by_hand(name)
    assert list(written) == HAND
    assert "$$" in written["Formula"] or len(written["Formula"]) > 80, "a formula, or why there is none"
    assert len(written["Chance level and interval"].split()) >= 15
    assert written["Traps"].count("\n- ") + written["Traps"].startswith("- ") >= 2
    assert re.search(r"\]\(\w+\.md\)", written["See also"])
    assert not re.search(r"TODO|TBD|FIXME|lorem", text_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_links_to_other_methods_name_what_they_lead_to(name: str) -> None:
    linked = re.findall(r"\[([^\]]+)\]\(([a-z_0-9]+)\.md\)", "\n".join(by_hand(name).values()))
    assert {target for _, target in linked} <= set(NAMES)
    assert all(words.strip("`") == target or " " in words for words, target in linked)
    assert name not in {target for _, target in linked}, "a page sends its reader to itself"


@pytest.mark.parametrize("name", NAMES)
def test_formulas_can_be_shown(name: str) -> None:
    text = text_of(name)
    assert text.count("$$") % 2 == 0
    for formula in formulas(text):
        assert shown(formula).startswith("<math")


def test_a_formula_that_cannot_be_shown_would_be_found() -> None:
    with pytest.raises(Exception, match="nosuchcommand"):
        shown(r"\nosuchcommand{x}")


def test_figures_are_those_that_the_pages_tell_of() -> None:
    facts = json.loads((PAGES / "figures.json").read_text(encoding="utf-8"))
    drawn = {name for name, told in facts.items() if told["figure"]}
    assert drawn <= set(NAMES)
    assert {path.stem for path in IMAGES.glob("*.png")} == drawn
    assert len(drawn) >= 95
    for name in NAMES:
        assert (f"](../images/methods/{name}.png)" in text_of(name)) == (name in drawn)


@pytest.mark.parametrize("path", sorted(IMAGES.glob("*.png")), ids=lambda path: path.stem)
def test_figures_are_small_pictures(path: Path) -> None:
    image = path.read_bytes()
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", image[16:24])
    assert width == 900
    assert 200 <= height <= 1100
    assert len(image) <= LARGEST


def test_pictures_keep_their_colours_when_they_are_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """An 8-bit picture of few colours comes back pixel by pixel; of many colours it has the number asked for."""
    pytest.importorskip("kaleido")
    monkeypatch.syspath_prepend(str(DOCS))
    import method_figures

    few = np.array([[[255, 0, 0], [0, 0, 255]], [[255, 255, 255], [255, 0, 0]]], np.uint8)
    image = method_figures.in_colours(few, 16)
    assert struct.unpack(">II", image[16:24]) == (2, 2)
    assert (unpacked(image) == few).all()
    many = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    back = unpacked(method_figures.in_colours(many, 24))
    assert len(np.unique(back.reshape(-1, 3), axis=0)) <= 24


@pytest.mark.slow
def test_commands_and_code_of_every_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings that pages share are made once; then every page asks its question, in both ways that it shows.

    Commands run as they stand, but on every third document of the bundled corpus, to be done in minutes.
    """
    from typer.testing import CliRunner

    from moescope.cli.app import app

    monkeypatch.chdir(tmp_path)
    corpus = (DOCS.parent / "probes" / "demo" / "corpus.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "some.jsonl").write_text("".join(corpus[::3]), encoding="utf-8")
    program = str(Path(sys.executable).parent / "moescope")
    made: set[str] = set()
    run = [name for name in NAMES if "<!-- not run: " not in text_of(name)]
    assert len(run) > 100
    for name in run:
        *recordings, _ = console_lines(name)
        for line in recordings:
            if line not in made:
                command = [program if word == "moescope" else word for word in shlex.split(line)]
                command += ["--data", "some.jsonl"] if line.startswith(ON_A_CORPUS) else []
                ran = subprocess.run(command, capture_output=True, text=True, check=False)
                assert ran.returncode == 0, f"{name}: {line}\n{ran.stderr[-2000:]}"
                made.add(line)
    for name in run:
        answer = CliRunner().invoke(app, shlex.split(console_lines(name)[-1])[1:])
        assert answer.exit_code == 0, f"{name}: {answer.output[-2000:]}"
        (code,) = re.findall(r"```python\n(.+?)```", text_of(name), re.DOTALL)
        exec(compile(code, f"{name}.md", "exec"), {})
