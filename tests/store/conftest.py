"""Stores for the tests of this folder, and a process that holds one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from moescope.store.run import Run
from moescope.store.store import Store

settings.register_profile("moescope", deadline=None, derandomize=True, database=None)
settings.load_profile("moescope")

_HOLD = """
import sys, duckdb
connection = duckdb.connect(sys.argv[1], read_only=sys.argv[2] == "read")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs.duckdb"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with Store(path) as opened:
        yield opened


@pytest.fixture
def run(store: Store) -> Run:
    return store.begin_run(name="base", model="demo")


@pytest.fixture
def held() -> Iterator[Callable[..., int]]:
    """`held(path, "write" | "read")` starts a process that holds the file and gives its PID."""
    processes: list[subprocess.Popen[str]] = []

    def hold(path: Path, mode: str = "write") -> int:
        command = [sys.executable, "-c", _HOLD, str(path), mode]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process.pid

    yield hold
    for process in processes:
        process.communicate("", timeout=20)
