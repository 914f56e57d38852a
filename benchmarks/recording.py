"""What recording costs: plain forward passes, moescope and other tools in turn, in one process, over the same batches.

    .venv/bin/python benchmarks/recording.py [--model olmoe-shaped|demo|NAME] [--rounds 7] [--dtype float32] [--memory]

One table: tokens a second, time as a multiple of the plain forward pass of the same round (median, least, most), and the
share of the true decisions that are kept at the end. A moescope run counts everything from its first batch to the settled
ledger of a durable store: forward passes, losses, rows, transactions. `--memory` runs each in a process of its own and
gives its peak over the plain forward's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from models import olmoe_shaped, random_corpus
from other_tools import available

import moescope as ms
from moescope.probes.forward import DeviceBatch, logits_of, to_device
from moescope.probes.live_model import LiveModel
from moescope.probes.recording import Recording

OURS = {
    "moescope: routing": ["routing"],
    "moescope: routing + experts": ["routing", "experts"],
    "moescope: default four": None,
    "moescope: all probes": ["routing", "experts", "residual", "router_logits", "expert_outputs"],
}
PLAIN = "plain forward"


class Bench:
    """One model and corpus; every method is a function of a folder that gives how many decisions it kept."""

    def __init__(self, given: argparse.Namespace) -> None:
        dtype = getattr(torch, given.dtype)
        if given.model == "olmoe-shaped":
            self.model: LiveModel = ms.load(olmoe_shaped(dtype))
            self.corpus = random_corpus(self.model.anatomy.vocabulary, given.sequences, given.length)
        else:
            self.model, self.corpus = ms.load(given.model), ms.Corpus.load(given.data)
        self.options = {"batch_size": given.batch_size, "max_length": given.length}
        plan = Recording(self.model, self.corpus, _scratch(), name="plan", probes=["routing"], **self.options).plan
        self.batches: list[DeviceBatch] = [to_device(batch, self.model) for batch in plan]
        self.tokens = int(sum(batch.mask.sum() for batch in self.batches))
        self.decisions = self.tokens * sum(s.top_k or 0 for s in self.model.anatomy.moe)
        others, self.absent = available(self.model) if not given.ours else ({}, {})
        self.methods: dict[str, Callable[[Path], int]] = {PLAIN: self._plain}
        self.methods |= {name: self._moescope(name, probes) for name, probes in OURS.items()}
        self.methods |= {name: lambda folder, run=run: run(self.batches, folder) for name, run in others.items()}

    def time(self, name: str) -> tuple[float, int]:
        """Seconds of one method, and the decisions it kept."""
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            kept = self.methods[name](Path(folder))
            return time.perf_counter() - started, kept

    def _plain(self, _folder: Path) -> int:
        with torch.no_grad():
            for batch in self.batches:
                logits_of(self.model, batch)
        return 0

    def _moescope(self, name: str, probes: list[str] | None) -> Callable[[Path], int]:
        def run(folder: Path) -> int:
            with ms.Store(folder / "runs.duckdb") as store:
                made = ms.record(
                    self.model, self.corpus, store, name=name, probes=probes, progress=False, **self.options
                )
                assert made.complete, made.coverage
                query = "SELECT sum(len(experts)) FROM routing WHERE run_id = $run"
                return int(store.fetch(query, {"run": made.run_id})[0][0])

        return run


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="olmoe-shaped")
    options.add_argument("--data", default="demo")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--dtype", default="float32")
    options.add_argument("--sequences", type=int, default=64)
    options.add_argument("--length", type=int, default=256)
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--ours", action="store_true", help="leave the other tools out")
    options.add_argument("--memory", action="store_true", help="peak memory of each method instead of its time")
    options.add_argument("--only", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.only:
        bench = Bench(given)
        bench.time(given.only)
        print(json.dumps(_peak_mib()))
    elif given.memory:
        _memory(given)
    else:
        _speed(Bench(given), given.rounds)


def _speed(bench: Bench, rounds: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in bench.methods}
    ratios: dict[str, list[float]] = {name: [] for name in bench.methods}
    kept: dict[str, int] = {}
    for number in range(rounds + 1):  # the first round warms up and is not counted
        for name in list(bench.methods):
            before, _ = bench.time(PLAIN)
            try:
                taken, kept[name] = bench.time(name)
            except Exception as error:  # another tool may fail in any way; the table says how
                if name in OURS or name == PLAIN:
                    raise
                bench.absent[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
                del bench.methods[name]
                continue
            after, _ = bench.time(PLAIN)
            if number:
                seconds[name].append(taken)
                ratios[name].append(2 * taken / (before + after))
    print(
        f"{bench.model!r}\n{bench.tokens:,} tokens, {bench.decisions:,} decisions, {rounds} rounds, {torch.get_num_threads()} threads"
    )
    print(f"{'':<42}{'tokens/s':>10}{'× plain':>9}{'least':>8}{'most':>8}{'decisions kept':>17}")
    for name in bench.methods:
        share = "" if name == PLAIN else f"{kept[name] / max(bench.decisions, 1):.1%}"
        spread = [statistics.median(ratios[name]), min(ratios[name]), max(ratios[name])]
        speed = bench.tokens / statistics.median(seconds[name])
        print(f"{name:<42}{speed:>10,.0f}{spread[0]:>9.3f}{spread[1]:>8.3f}{spread[2]:>8.3f}{share:>17}")
    for name, reason in bench.absent.items():
        print(f"{name:<42}did not run: {reason}")


def _memory(given: argparse.Namespace) -> None:
    passed = ["--model", given.model, "--data", given.data, "--dtype", given.dtype, "--sequences", str(given.sequences)]
    passed += ["--length", str(given.length), "--batch-size", str(given.batch_size), "--ours"]
    peaks = {}
    for name in [PLAIN, *OURS]:
        ran = subprocess.run(
            [sys.executable, __file__, *passed, "--only", name], check=True, capture_output=True, text=True
        )
        peaks[name] = float(json.loads(ran.stdout.splitlines()[-1]))
        print(f"{name:<42}{peaks[name]:>9,.0f} MiB peak{peaks[name] - peaks[PLAIN]:>+9,.0f} MiB over the plain forward")


def _peak_mib() -> float:
    """Largest resident size of this process so far; that of a parent is not counted."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _scratch() -> ms.Store:
    return ms.Store(Path(tempfile.mkdtemp()) / "plan.duckdb")


if __name__ == "__main__":
    main()
