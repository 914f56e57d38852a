"""The built documentation: no warning, nothing loaded from elsewhere, formulas that browsers draw by themselves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

# Attributes whose address a browser fetches by itself; a link that waits to be followed is none.
_FETCHED = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "audio": "src",
    "embed": "src",
}
_RELATIONS = {"stylesheet", "preload", "prefetch", "icon", "modulepreload", "manifest", "preconnect", "dns-prefetch"}


class _Fetches(HTMLParser):
    """Collects what a browser would fetch for a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        address = given.get(_FETCHED.get(tag, ""))
        if tag == "link" and _RELATIONS & set((given.get("rel") or "").split()):
            address = given.get("href")
        if address:
            self.found.append(address)


def fetched(text: str) -> list[str]:
    """Addresses that a page makes a browser fetch."""
    parser = _Fetches()
    parser.feed(text)
    return parser.found


def test_fetches_are_found() -> None:
    text = (
        '<a href="https://a.example"></a><script src="https://b.example/x.js"></script><link rel="icon" href="i.png">'
    )
    assert fetched(text) == ["https://b.example/x.js", "i.png"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, documented: ModuleType) -> Path:
    """The pages, built with warnings as errors and every way to the network shut."""
    out = tmp_path_factory.mktemp("built")
    shut = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(out / "trees")]
    done = subprocess.run(
        [*command, str(documented.DOCS), str(out / "html")],
        capture_output=True, text=True, check=False, env={**os.environ, **shut},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return out / "html"


@pytest.mark.slow
def test_every_page_is_built_without_a_warning(built: Path, documented: ModuleType) -> None:
    pages = {p.relative_to(documented.DOCS).with_suffix(".html") for p in documented.DOCS.rglob("*.md")}
    assert pages <= {p.relative_to(built) for p in built.rglob("*.html")}


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(built: Path) -> None:
    for page in built.rglob("*.html"):
        outside = [a for a in fetched(page.read_text(encoding="utf-8")) if re.match(r"(?:https?:)?//", a)]
        assert not outside, page.name
    for sheet in built.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


@pytest.mark.slow
def test_formulas_are_drawn_by_the_browser(built: Path) -> None:
    text = (built / "methods" / "router_entropy.html").read_text(encoding="utf-8")
    assert "<math" in text
    assert "MathJax" not in text


def test_a_formula_that_cannot_be_shown_is_an_error(documented: ModuleType) -> None:
    from importlib.util import module_from_spec, spec_from_file_location

    from sphinx.errors import ExtensionError

    spec = spec_from_file_location("mathml_of_docs", documented.DOCS / "sphinx" / "mathml.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert "<mfrac>" in module.as_mathml(r"\tfrac{1}{2}", block=False)
    assert 'display="block"' in module.as_mathml(r"a \dots b", block=True)
    with pytest.raises(ExtensionError, match="nosuchcommand"):
        module.as_mathml(r"\nosuchcommand{x}", block=False)
