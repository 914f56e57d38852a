"""Every benchmark in turn, and one page of what they found: docs/benchmarks.md.

    .venv/bin/python benchmarks/everything.py [--size quick|full] [--only recording,store] [--out docs/benchmarks.md]

Each runs in a process of its own, so that none warms another up. `quick` takes about twenty minutes on two cores, `full` some
hours. The page says on what machine, with which versions and under which load each figure came about; a benchmark that fails is
shown with its error, and the command then leaves with 1. What each measures is told by the head of its own file.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results"
VERSIONS = ("torch", "transformers", "duckdb", "numpy", "pyarrow", "sae-lens", "dash")


@dataclass(frozen=True)
class Benchmark:
    """One file of this folder, with its arguments at either size."""

    file: str
    title: str
    quick: tuple[str, ...] = ()
    full: tuple[str, ...] = ()


BENCHMARKS = (
    Benchmark("recording.py", "Recording beside a plain forward pass", ("--rounds", "3", "--sequences", "32")),
    Benchmark("attention.py", "Statistics of attention", ("--lengths", "1024", "2048", "--rounds", "2")),
    Benchmark("interventions.py", "Edits and sweeps", ("--sequences", "8", "--length", "128", "--repeats", "10")),
    Benchmark("store.py", "Writing and asking", ("--decisions", "3e6", "--rounds", "2"), ("--decisions", "3e6,30e6,130e6")),
    Benchmark("store_sizes.py", "Bytes in the store", ("--sequences", "32")),
    Benchmark("routing.py", "Analyses of routing", ("--tokens", "40000", "--layers", "8"), ("--logits",)),
    Benchmark("sae.py", "Training an autoencoder", ("--model", "demo", "--layer", "3", "--tokens", "16384", "--rounds", "2",
                                                    "--spec", "topk:d=1024,k=16")),
    Benchmark("dashboard.py", "The dashboard", ("--decisions", "2.5e6", "--rounds", "2", "--times", "6",
                                                "--store", str(RESULTS / "dashboard-quick.duckdb"))),
    Benchmark("lab.py", "The lab's sliders", ("--moves", "20")),
)  # fmt: skip


@dataclass
class Ran:
    """What became of one benchmark."""

    benchmark: Benchmark
    command: str
    said: str
    error: str
    seconds: float
    load: float


def main() -> None:
    given = _arguments()
    wanted = [name.strip().removesuffix(".py") for name in given.only.split(",") if name.strip()]
    known = {one.file.removesuffix(".py"): one for one in BENCHMARKS}
    if unknown := [name for name in wanted if name not in known]:
        sys.exit(f"there is no benchmark {', '.join(unknown)}. Expected: {', '.join(known)}.")
    ran = [_run(known[name], given.size) for name in wanted or known]
    page = _page(ran, given.size, given.out.read_text(encoding="utf-8") if given.out.exists() else "")
    partial = given.out.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(given.out)
    sys.stderr.write(f"wrote {given.out}\n")
    sys.exit(1 if any(one.error for one in ran) else 0)


def _arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--size", choices=("quick", "full"), default="quick")
    options.add_argument(
        "--only", default="", help="names of files, with commas between them; the page keeps the others"
    )
    options.add_argument("--out", type=Path, default=HERE.parent / "docs" / "benchmarks.md")
    return options.parse_args()


def _run(benchmark: Benchmark, size: str) -> Ran:
    arguments = benchmark.quick if size == "quick" else benchmark.full
    sys.stderr.write(f"{benchmark.file} {' '.join(arguments)} …\n")
    load, started = os.getloadavg()[0], time.perf_counter()
    done = subprocess.run(
        [sys.executable, benchmark.file, *arguments], cwd=HERE, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    error = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"left with {done.returncode}"])[-1]
    shown = " ".join(a.replace(str(HERE.parent) + "/", "") for a in arguments)
    return Ran(benchmark, f"python benchmarks/{benchmark.file} {shown}".strip(), done.stdout, error, seconds, load)


def _page(ran: list[Ran], size: str, before: str) -> str:
    """The page; of benchmarks that were not run again, the sections that it had, if it was of this machine."""
    facts = _table(("the machine", ""), list(machine().items()))
    sections = _sections(before) if facts in before else {}
    sections |= {one.benchmark.title: _section(one) for one in ran}
    left_out = [one.title for one in BENCHMARKS if one.title not in sections]
    parts = [
        "# Benchmarks\n\n"
        f"Written by `make bench` (`benchmarks/everything.py --size {size}`). Times are of the machine below and of its load then;"
        " ratios, taken in turn in one process, carry over better than seconds."
        + (f" Not run for this page: {', '.join(left_out)}." if left_out else "")
        + "\n",
        facts,
        *(sections[one.title] for one in BENCHMARKS if one.title in sections),
    ]
    return "\n".join(parts)


def _sections(page: str) -> dict[str, str]:
    """Title → section of a page that was written before."""
    return {part.split("\n", 1)[0]: f"## {part.rstrip()}\n" for part in page.split("\n## ")[1:]}


def _section(one: Ran) -> str:
    when = f"commit {_commit()}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    parts = [
        f"## {one.benchmark.title}\n\n{_head(HERE / one.benchmark.file)}\n",
        f"`{one.command}`: {one.seconds:.0f} s; {one.load:.1f} programs wanted a core when it began; {when}.\n",
        f"**Failed**: `{one.error}`\n" if one.error else "",
        _output(one.said),
    ]
    return "\n".join(part for part in parts if part)


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "Processor": f"{_processor()}, {os.cpu_count()} cores",
        "Memory": f"{memory:.0f} GiB",
        "System": platform.platform(terse=True),
        "Python": platform.python_version(),
        "Versions": ", ".join(f"{name} {version(name)}" for name in ("moescope", *VERSIONS)),
    }


def _processor() -> str:
    facts = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", facts.read_text()) if facts.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "not known"


def _head(file: Path) -> str:
    """What the benchmark says of itself, without the line that shows how to call it."""
    told = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    paragraphs = [p for p in told.split("\n\n") if "python benchmarks/" not in p]
    return "\n\n".join(" ".join(p.split()) for p in paragraphs)


def _table(head: tuple[str, ...], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def _output(said: str) -> str:
    """Markdown tables as they stand, one level of headings down; anything else as it was printed."""
    lines = [line.rstrip() for line in said.strip().splitlines()]
    if not any(line.startswith("|---") for line in lines):
        return "```text\n" + "\n".join(lines) + "\n```\n" if lines else ""
    deeper = [re.sub(r"^#+ ", "### ", line) for line in lines]
    return "\n".join(deeper) + "\n"


if __name__ == "__main__":
    main()
