"""How fast the dashboard is on a large store: first text, useful view, figure, bytes, interactions and memory, in a cold browser.

    .venv/bin/python benchmarks/dashboard.py [--store PATH] [--decisions 25e6] [--pages /tokens,/experts] [--rounds 3]
        [--times 12] [--out FOLDER]

The store is made where it is not there yet (`dashboard_store.py`). Every page of the registry is opened `--rounds` times, each
time by a server that has just begun and a Chromium with an empty profile; times are of the page's own clock from the start of
navigation, the median of the rounds. Interactions repeat `--times` times in one browser on one server, each time for something
not asked for before; the first counts too. Times mean something on a quiet machine only: its load is written beside them. `useful`
is a page's own test: its text, tables or cards are there. A table with the bars, and beside it JSON and Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dashboard_browser import ColdBrowser
from dashboard_plan import BARS, PLANS, PagePlan, plan_of
from dashboard_server import Served
from dashboard_store import made

import moescope.dashboard.pages  # noqa: F401  registers the pages
from moescope.core.pages import pages

RESULTS = Path(__file__).parent / "results"


@dataclass
class Measured:
    """What one page took; milliseconds, megabytes."""

    path: str
    first_text: list[float] = field(default_factory=list)
    useful: list[float] = field(default_factory=list)
    figure: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    interactions: dict[str, dict[str, Any]] = field(default_factory=dict)
    memory_mb: float = 0.0
    complaints: list[str] = field(default_factory=list)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--store", type=Path, default=RESULTS / "dashboard.duckdb")
    options.add_argument("--decisions", type=float, default=25e6)
    options.add_argument("--pages", default="", help="paths with commas between them; all where left out")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--times", type=int, default=12)
    options.add_argument("--out", type=Path, default=RESULTS)
    given = options.parse_args()
    given.store.parent.mkdir(parents=True, exist_ok=True)
    made(given.store, int(given.decisions))
    paths = given.pages.split(",") if given.pages else [page.path for page in sorted(pages, key=lambda p: p.order)]
    found = []
    for path in paths:
        found.append(_measured(given.store, plan_of(path), given.rounds, given.times))
        sys.stderr.write("\n".join(_lines([found[-1]])) + "\n")
    busy = f"{os.getloadavg()[1]:.1f} programs wanted one of {os.cpu_count()} processors, the mean of five minutes."
    text = "\n".join(["# The dashboard on a large store", "", busy, "", *_lines(found), ""])
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "dashboard.md").write_text(text)
    (given.out / "dashboard.json").write_text(json.dumps([asdict(one) for one in found], indent=1))
    print(text)


def _measured(store: Path, plan: PagePlan, rounds: int, times: int) -> Measured:
    found = Measured(plan.path)
    for _ in range(rounds):
        with Served(store) as served, ColdBrowser() as browser:
            wanted = {"useful": plan.useful} | ({"figure": plan.figure} if plan.figure else {})
            marks = browser.load(served.url + plan.path + plan.query, wanted)
            for name, kept in (("first text", found.first_text), ("useful", found.useful), ("figure", found.figure)):
                if name in marks:
                    kept.append(float("inf") if marks[name] is None else float(marks[name]))
            found.megabytes.append(browser.transferred() / 1e6)
            found.complaints += browser.complaints()
    with Served(store) as served, ColdBrowser() as browser:
        for name, where in plan.interactions.items():
            browser.load(served.url + plan.path + (where.query or plan.query), {"useful": where.ready or plan.useful})
            found.interactions[name] = _repeated(browser, where, times) | {"kind": where.kind}
        found.complaints += browser.complaints()
        found.memory_mb = served.peak_mb()
    return found


def _repeated(browser: ColdBrowser, where: Any, times: int) -> dict[str, Any]:
    took, failed = [], 0
    for number in range(times):
        happened, milliseconds, _ = browser.act(where.action.replace("{i}", str(number)), where.test)
        took.append(milliseconds)
        failed += not happened
    return {"milliseconds": took, "failed": failed}


def _lines(found: Sequence[Measured]) -> list[str]:
    lines = ["| page | what | median | p95 or worst | bar | |", "|---|---|---|---|---|---|"]
    for one in found:
        lines += [f"| {one.path} | {' | '.join(cells)} |" for cells in _cells(one)]
        lines += [f"| {one.path} | console: {complaint[:160]} | | | | ✕ |" for complaint in one.complaints[:3]]
    return lines


def _cells(one: Measured) -> Iterator[tuple[str, ...]]:
    loads = {"first text": one.first_text, "useful view": one.useful, "first figure": one.figure}
    for name, values in loads.items():
        if values:
            yield _cell(name, statistics.median(values), max(values), BARS[name], "ms")
    heavy = "bytes, with a figure" if one.figure else "bytes, without a figure"
    yield _cell(heavy, statistics.median(one.megabytes), max(one.megabytes), BARS[heavy], "MB")
    for name, measured in one.interactions.items():
        values = sorted(measured["milliseconds"])
        median, high = statistics.median(values), values[min(len(values) - 1, int(0.95 * len(values)))]
        cell = _cell(f"{name} ({measured['kind']})", median, high, BARS[measured["kind"]], "ms")
        slow_tail = measured["kind"] == "server" and high > BARS["server, p95"]
        verdict = f"✕ {measured['failed']} never ended" if measured["failed"] else "✕ p95" if slow_tail else cell[-1]
        yield (*cell[:-1], verdict)
    yield _cell("server memory, peak", one.memory_mb, one.memory_mb, BARS["server memory"], "MB")


def _cell(name: str, middle: float, high: float, bar: float, unit: str) -> tuple[str, ...]:
    digits = 2 if unit == "MB" and bar < 100 else 0
    numbers = [f"{value:,.{digits}f} {unit}" for value in (middle, high, bar)]
    return name, *numbers, "✓" if middle <= bar else "✕"


if __name__ == "__main__":
    if unplanned := [page.path for page in pages if page.path not in PLANS]:
        sys.stderr.write(f"pages without a plan of their own: {', '.join(unplanned)}\n")
    main()
