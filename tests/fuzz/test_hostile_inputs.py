"""Hostile files and words, thousands of them: read or refused in one line, in bounded time and memory, nothing written."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

CHILD = Path(__file__).parent / "fuzz_child.py"
_PATIENCE = 90.0  # seconds without a word after which a reader is taken to hang where no signal reaches it


def _came_of(seed: int, first: int, stop: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """How many cases were accepted and refused, and what went wrong with the others."""
    came: Counter[str] = Counter()
    wrong: list[str] = []
    while first < stop:
        lines, end = _lines(seed, first, stop, folder / str(first))
        for line in lines:
            told = json.loads(line)
            first = told["case"] + 1
            if told["came"] in ("accepted", "refused"):
                came[told["came"]] += 1
            else:
                wrong.append(f"case {told['case']} of seed {seed}: {told['came']}")
        if first < stop:
            wrong.append(f"case {first} of seed {seed} {end}")
            first += 1
    return came, wrong


def _lines(seed: int, first: int, stop: int, folder: Path) -> tuple[list[str], str]:
    """What one process tells, and how it ended."""
    folder.mkdir()
    places = [f"--seed={seed}", f"--first={first}", f"--stop={stop}", f"--folder={folder}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    lines: list[str] = []
    with (
        (folder.parent / f"{first}.err").open("w+") as errors,
        subprocess.Popen(
            [sys.executable, str(CHILD), *places], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as child,
    ):
        assert child.stdout is not None
        while select.select([child.stdout], [], [], _PATIENCE)[0]:
            line = child.stdout.readline()
            if not line:
                code = child.wait()
                errors.seek(0)
                return lines, f"ended the process with {code}: {errors.read()[-2000:]}"
            lines.append(line)
        child.kill()
    return lines, "hangs"


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_ten_thousand_hostile_inputs_are_read_or_refused(part: int, tmp_path: Path) -> None:
    came, wrong = _came_of(0, part * 1000, (part + 1) * 1000, tmp_path)
    assert not wrong, "\n\n".join(wrong[:5])
    assert came.total() == 1000
    assert came["accepted"] > 50
    assert came["refused"] > 300


def test_three_hundred_hostile_inputs_are_read_or_refused(tmp_path: Path) -> None:
    came, wrong = _came_of(1, 1, 301, tmp_path)
    assert not wrong, "\n\n".join(wrong[:5])
    assert came.total() == 300
    assert came["accepted"] > 10
    assert came["refused"] > 90


def test_a_case_is_the_same_each_time(tmp_path: Path) -> None:
    drawn = []
    for name in ("one", "other"):
        folder = tmp_path / name
        code = (
            "import sys; from pathlib import Path; from hostile_cases import case\n"
            "for n in (3, 4, 8, 9, 16):\n"
            f"    f = Path({str(folder)!r}) / str(n); f.mkdir(parents=True); c = case(n, f)\n"
            "    held = [p.read_bytes().hex() for p in sorted(f.rglob('*')) if p.is_file()]\n"
            "    print(c.reader, c.text.encode('utf-8', 'replace'), c.options, held)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=CHILD.parent, capture_output=True, text=True, check=True
        )
        drawn.append(done.stdout)
    assert drawn[0] == drawn[1]
    assert len(drawn[0].splitlines()) == 5
