"""Answers that are made to take long, to mislead, or never to end; and seeds that are no seeds."""

from __future__ import annotations

import fcntl
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moescope.core.errors import RunError
from moescope.sae.concepts.command import completion_command
from moescope.sae.concepts.prompts import read_description, read_judgements, read_words


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail where the block takes longer: what is linear needs no hundredth of it, what is quadratic many times as long."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"still reading after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("between", [" ", "\n", "\t \n", "\u00a0"])
def test_blanks_without_end_are_read_at_once(between: str) -> None:
    nothing = (between * 20_000)[:19_900]
    with within(5):
        assert read_judgements(nothing, 2) == [None, None]
        assert read_judgements(f"2: no{nothing}", 2) == [None, False]


@pytest.mark.parametrize("between", [" ", "\n", "\u00a0"])
def test_a_label_before_blanks_without_end_is_read_at_once(between: str) -> None:
    with within(5):
        assert read_judgements(f"passage{between * 19_900}", 1) == [None]
        assert read_description(f"description{between * 19_900}: years") == "years"
        assert read_words(f"words{between * 19_900}: cat, dog")[:2] == ["cat", "dog"]


@pytest.mark.parametrize(
    ("answer", "count", "said"),
    [("1: Yes\n1: 0.9 confidence", 1, [True]), ("1: no.\n1: 1.0 sure\n2: yes\n2: 0.05", 2, [False, True])],
)
def test_how_sure_an_answer_is_is_no_answer(answer: str, count: int, said: list[bool | None]) -> None:
    assert read_judgements(answer, count) == said


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_program_that_writes_without_end_is_ended(tmp_path: Path, stream: str) -> None:
    script = tmp_path / "endless.py"
    # It ends by itself after 256 MiB, so that nothing fills a memory or a disk where nobody ends it.
    script.write_text(f"import sys\nfor _ in range(4096):\n    sys.{stream}.write('yes ' * 16384)\n")
    with pytest.raises(RunError, match="writes without end"):
        completion_command(f"{sys.executable} {script}", timeout=60)("prompt")


def test_what_a_program_starts_ends_with_it(tmp_path: Path) -> None:
    """A child that holds the program's output open keeps nobody waiting, and does not live on: its lock is free."""
    script, lock = tmp_path / "parent.py", tmp_path / "lock"
    script.write_text(
        "import fcntl, subprocess, sys\n"
        f"held = open({str(lock)!r}, 'w')\n"
        "fcntl.flock(held, fcntl.LOCK_EX)\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(10)'], pass_fds=[held.fileno()])\n"
        "print('yes')\n"
    )
    assert completion_command(f"{sys.executable} {script}", timeout=4)("prompt") == "yes\n"
    with lock.open() as opened:
        for _ in range(100):
            with suppress(BlockingIOError):
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.02)
        else:
            pytest.fail("what the program started is still running")


ENOUGH = {
    "probe": ["--units", "expert"],
    "read": ["--sae", "mine"],
    "describe": ["--command", "cat", "--unit", "1"],
    "train": ["--run", "run", "--site", "blocks.1.hook_resid_post", "--spec", "topk:d=32,k=4"],
    "students": ["demo", "--layer", "1"],
}


@pytest.mark.parametrize("verb", ENOUGH)
def test_a_seed_under_0_is_refused(verb: str, tmp_path: Path) -> None:
    from moescope.cli.app import app

    words = ["sae", verb, *ENOUGH[verb], "--store", str(tmp_path / "runs.duckdb"), "--seed", "-1"]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert done.exit_code == 2
    assert "Invalid value for '--seed': Input should be greater than or equal to 0" in done.output
