"""`moescope sae probe` and `moescope sae describe`, on a planted run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from moescope.cli.sae.describe import describe
from moescope.cli.sae.probe import probe
from moescope.core.errors import InputError
from moescope.store.store import Store

DOCUMENTS, LENGTH = 40, 12


@pytest.fixture
def call(plant: Callable[..., Any], planted: ModuleType, store: Store) -> Callable[..., Any]:
    """`call(*words)`: run the command on a store with one run, where label a alone takes expert 3."""
    labels = ["a", "b"] * (DOCUMENTS // 2)
    chosen = np.where(np.repeat(np.array(labels) == "a", LENGTH), 3, np.arange(DOCUMENTS * LENGTH) % 3)
    plant(lengths=[LENGTH] * DOCUMENTS, labels=labels, routers=[planted.Router(chosen[:, None], 5)])
    store.close()
    app = typer.Typer()
    app.command()(probe)
    app.command()(describe)

    def run(*words: str) -> Any:
        return CliRunner().invoke(app, [words[0], "--store", str(store.path), *words[1:]])

    return run


def test_probes_are_printed_with_their_nulls(call: Callable[..., Any]) -> None:
    done = call("probe", "--units", "expert", "--k", "1", "--draws", "50", "--skip-first", "0", "--concept", "a")
    assert done.exit_code == 0, done.output
    line = next(line for line in done.stdout.splitlines() if line.startswith("a ") and " 1.000 " in line)
    assert "1.000 to 1.000" in line
    told = call("probe", "--units", "expert", "--k", "1", "--draws", "50", "--json")
    found = json.loads(told.stdout)
    assert found["unit_kind"] == "expert"
    assert {row["concept"] for row in found["rows"]} == {"a", "b"}


def test_a_program_describes_and_judges(call: Callable[..., Any], tmp_path: Path) -> None:
    script = tmp_path / "answers.py"
    script.write_text(
        "import re, sys\n"
        "prompt = sys.stdin.read()\n"
        "numbers = re.findall(r'(?m)^(\\d+)\\. ', prompt)\n"
        "print('DESCRIPTION: texts of a' if 'DESCRIPTION:' in prompt else '\\n'.join(f'{n}: yes' for n in numbers))\n"
    )
    words = ("--unit-kind", "expert", "--layer", "0", "--unit", "3", "--examples", "4", "--judged", "4", "--width", "4")
    done = call("describe", "--command", f"{sys.executable} {script}", *words, "--score", "detection")
    assert done.exit_code == 0, done.output
    assert "texts of a" in done.stdout
    assert "detection 0.50" in done.stdout
    told = call("describe", "--command", f"{sys.executable} {script}", *words, "--score", "detection", "--json")
    assert json.loads(told.stdout)["kept"] == [3]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("probe", "--units", "mood"), "--units cannot be 'mood'"),
        (("probe", "--units", "expert", "--concept", "c"), "no concept of this run"),
        (("probe", "--units", "expert", "--run", "other"), "no run called"),
        (("describe", "--command", "no-such-program", "--unit", "1"), "no program"),
        (("describe", "--command", "cat", "--unit", "1", "--unit-kind", "expert"), "which layer"),
    ],
)
def test_mistakes_are_told(call: Callable[..., Any], words: tuple[str, ...], said: str) -> None:
    done = call(*words)
    assert isinstance(done.exception, InputError)
    assert said in str(done.exception)
