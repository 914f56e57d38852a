"""A small recorded run whose every name is hostile, and a reader of HTML that minds what is left open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from typing import Any

import pytest

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&lt;\u202e"
_VOID = {"br", "img", "hr", "input", "meta"}


class Reader(HTMLParser):
    """Tags and words of some HTML, and whether every tag is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.faults: list[str] = []
        self.feed(text)
        self.close()
        self.faults += [f"<{tag}> stays open" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        """All words."""
        return " ".join(self.words)


@pytest.fixture(scope="session")
def hostile() -> str:
    """Text that would do harm where it is not escaped."""
    return HOSTILE


@pytest.fixture(scope="session")
def read_html() -> Callable[[str], Reader]:
    """Reads HTML as a browser's parser does, more strictly."""
    return Reader


@pytest.fixture(scope="session")
def shown() -> Callable[[Any], dict[str, Any]]:
    """What IPython's own formatter makes of an object: kind of data → data."""
    from IPython.core.formatters import DisplayFormatter

    def format_(thing: Any) -> dict[str, Any]:
        data, _ = DisplayFormatter().format(thing)
        return dict(data)

    return format_


@pytest.fixture(scope="session")
def hostile_run(demo_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A run of the bundled model whose name, labels and texts are hostile."""
    import moescope as ms

    texts = [{"text": f"{HOSTILE} Hello world {i}. " * 3, "label": HOSTILE} for i in range(4)]
    with ms.Store(tmp_path_factory.mktemp("shown") / "runs.duckdb") as store:
        yield ms.record(demo_model, ms.Corpus.load(texts), store, name=HOSTILE, progress=False)
