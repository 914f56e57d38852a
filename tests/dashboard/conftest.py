from __future__ import annotations

import importlib.util
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from moescope.cli.app import app
from moescope.store.store import Store

_SPEC = importlib.util.spec_from_file_location("planted", Path(__file__).parent / "planted.py")
assert _SPEC is not None
assert _SPEC.loader is not None
planted: Any = importlib.util.module_from_spec(_SPEC)
sys.modules["planted"] = planted
_SPEC.loader.exec_module(planted)


@pytest.fixture(scope="session")
def parsed() -> Callable[[str], dict[str, Any]]:
    """What the command line makes of a command, without running it; what it refuses is raised."""

    def parse(line: str) -> dict[str, Any]:
        command: Any = typer.main.get_command(app)
        first, *words = shlex.split(line)
        assert first == "moescope"
        context = command.make_context("moescope", [], resilient_parsing=True)
        while hasattr(command, "get_command"):
            command = command.get_command(context, words.pop(0))
        return dict(command.make_context(command.name, words).params)

    return parse


@pytest.fixture
def Plan() -> Any:
    return planted.Plan


@pytest.fixture
def Text() -> Any:
    return planted.Text


@pytest.fixture
def store_of(tmp_path: Path) -> Iterator[Callable[..., Store]]:
    opened: list[Store] = []

    def make(*plans: Any) -> Store:
        opened.append(planted.planted_store(tmp_path / f"{len(opened)}.duckdb", *plans))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def run(store_of: Callable[..., Store], Plan: Any) -> Any:
    """One complete mixture-of-experts run."""
    return store_of(Plan()).run("planted")
