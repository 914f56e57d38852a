"""Progress in a notebook: one output that is rewritten, a few times, and ends as a line of text."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from moescope.core import bar as bars
from moescope.core.bar import NotebookBar, bar, stages


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, str]]]:
    """What a notebook is told, in order: `display` for a new output, `update` for a rewritten one."""
    told: list[tuple[str, dict[str, str]]] = []

    class Handle:
        def display(self, data: dict[str, str], *, raw: bool) -> None:
            assert raw
            told.append(("display", data))

        def update(self, data: dict[str, str], *, raw: bool) -> None:
            assert raw
            told.append(("update", data))

    monkeypatch.setattr("IPython.display.DisplayHandle", Handle)
    monkeypatch.setattr(bars, "in_notebook", lambda: True)
    return told


def test_a_thousand_steps_are_one_output_rewritten_a_few_times(outputs: list[tuple[str, dict[str, str]]]) -> None:
    began = time.monotonic()
    with NotebookBar() as drawn:
        task = drawn.add_task("recording base", total=1000, speed="")
        for step in range(1000):
            drawn.update(task, completed=step + 1, speed=f"{step + 1} tokens")
    took = time.monotonic() - began
    kinds = [kind for kind, _ in outputs]
    assert kinds.count("display") == 1
    assert len(kinds) <= 4 + took / 0.5


def test_what_stays_is_one_line_of_text_with_the_end(outputs: list[tuple[str, dict[str, str]]]) -> None:
    with NotebookBar() as drawn:
        task = drawn.add_task("recording base", total=8, speed="")
        drawn.update(task, completed=8, speed="8 tokens, 4/s")
    kind, last = outputs[-1]
    assert set(last) == {"text/plain"}
    assert last["text/plain"].startswith("recording base: 100% · 8 tokens, 4/s · ")
    assert kind == "update"


def test_the_bar_on_the_way_is_plain_html_with_the_share_done(
    outputs: list[tuple[str, dict[str, str]]], hostile: str, read_html: Callable[[str], Any]
) -> None:
    drawn = NotebookBar()
    task = drawn.add_task(hostile, total=4)
    drawn.start()
    drawn.update(task, completed=1, refresh=True)
    read = read_html(outputs[-1][1]["text/html"])
    assert read.faults == []
    assert ("progress", {"value": "1", "max": "4"}) in read.tags
    assert {tag for tag, _ in read.tags} == {"div", "progress"}
    assert "25%" in read.text
    drawn.stop()


def test_work_that_fails_shows_how_far_it_came(outputs: list[tuple[str, dict[str, str]]]) -> None:
    drawn = NotebookBar()
    drawn.start()
    drawn.advance(drawn.add_task("recording", total=4), 1)
    drawn.__exit__(RuntimeError, RuntimeError(), None)
    assert outputs[-1][1]["text/plain"].startswith("recording: 25%")


def test_two_pieces_of_work_share_one_output(outputs: list[tuple[str, dict[str, str]]]) -> None:
    with NotebookBar() as drawn:
        for name in "ab":
            drawn.advance(drawn.add_task(name, total=1))
    assert [kind for kind, _ in outputs].count("display") == 1
    assert [line[:7] for line in outputs[-1][1]["text/plain"].splitlines()] == ["a: 100%", "b: 100%"]


def test_a_notebook_gets_a_bar_of_its_own_and_none_where_nothing_is_to_be_shown(
    outputs: list[tuple[str, dict[str, str]]],
) -> None:
    assert isinstance(bar((), shown=True), NotebookBar)
    with stages("planning", shown=True) as tell:
        tell("counting")
    assert outputs[-1][1]["text/plain"].startswith("planning: 100%")
    before = len(outputs)
    quiet = bar((), shown=False)
    quiet.start()
    quiet.advance(quiet.add_task("recording", total=1))
    quiet.stop()
    assert len(outputs) == before


def test_recording_and_its_kin_all_draw_through_it(outputs: list[tuple[str, dict[str, str]]]) -> None:
    from moescope.probes.progress import RunProgress
    from moescope.probes.sweeps.progress import SweepProgress
    from moescope.sae.concepts.counting import counted

    with RunProgress("recording", 10, shown=True) as run:
        run.advance_to(10, 5, 1.0)
    with SweepProgress("experts", 2, 3, shown=True) as sweep:
        sweep.tick(6)
    with counted("probes", 2, shown=True) as count:
        count(2)
    ends = [data["text/plain"].split(" · ")[0] for _, data in outputs if "text/html" not in data]
    assert ends == ["recording: 100%", "experts: 100%", "probes: 100%"]
