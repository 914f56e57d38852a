"""The command line in this process: its exit code, and what it writes to stdout and to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TEXTS = (
    {"text": "The quick brown fox jumps over the lazy dog, twice.", "label": "english"},
    {"text": "def add(a, b):\n    return a + b\n", "label": "python"},
    {"text": "Am Anfang schuf Gott Himmel und Erde.", "label": "german"},
)


@dataclass
class Outcome:
    """What one call of the command line gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What stdout holds, read as JSON; anything beside it is an error."""
        return json.loads(self.out, parse_constant=_refuse)

    def assert_refused(self, *words: str) -> None:
        """Exit code 2, nothing on stdout, one clear line on stderr that holds `words`."""
        assert self.code == 2, self.err
        assert self.out == ""
        assert self.err.startswith("error: "), self.err
        assert self.err.count("\n") == 1, f"more than one line: {self.err!r}"
        assert "Traceback" not in self.err
        for word in words:
            assert word in self.err


def _refuse(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON")


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """`cli("runs", path, "--json")` runs the command in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("MOESCOPE_DEBUG", "")

    def call(*arguments: object) -> Outcome:
        from moescope.cli.app import run

        monkeypatch.setattr(sys, "argv", ["moescope", *map(str, arguments)])
        capsys.readouterr()
        code = run()
        said = capsys.readouterr()
        return Outcome(code, said.out, said.err)

    return call


def _write(path: Path, records: Sequence[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three short labelled texts."""
    return _write(tmp_path / "texts.jsonl", TEXTS)


@pytest.fixture
def demo_loaded(demo_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give commands that load "demo" with default options the model already in memory; all else is loaded as ever."""
    import moescope.probes.loading as module

    plain = module.load

    def load(model: str, **options: Any) -> Any:
        default = {"device": "auto", "dtype": "auto", "revision": None, "trust_remote_code": False}
        return demo_model if model == "demo" and options == default else plain(model, **options)

    monkeypatch.setattr(module, "load", load)
