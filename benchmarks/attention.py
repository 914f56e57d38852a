"""What statistics of attention cost: time over a plain forward pass, and peak memory, as a text grows longer.

    .venv/bin/python benchmarks/attention.py [--model PATH] [--lengths 1024 2048 4096] [--rounds 3]

The plain pass and the pass with every layer's attention reduced, on the same random ids: least times in turn, and in a
process of their own by how much each raises the peak of resident memory. A pattern kept whole would take
4 · heads · T² bytes a layer, which the last column shows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable

import torch

import moescope as ms
from moescope.core.sites import Site
from moescope.probes.attention_reduced import attention_reduced
from moescope.probes.attention_slices import PatternSlices
from moescope.probes.attention_statistics import reduce_pattern
from moescope.probes.live_model import LiveModel


def main() -> None:
    given = _arguments()
    if given.one:
        sys.stdout.write(json.dumps(measured(ms.load(given.model), given.one, given.rounds, given.way)) + "\n")
        return
    sys.stdout.write("tokens  plain s  reduced s  ratio  plain MiB  reduced MiB  whole pattern MiB\n")
    for length in given.lengths:
        found = {way: _in_a_process(given, length, way) for way in ("plain", "reduced", "times")}
        times = found["times"]
        sys.stdout.write(
            f"{length:>6}  {times['plain']:>7.2f}  {times['reduced']:>9.2f}  {times['reduced'] / times['plain']:>5.2f}  "
            f"{found['plain']['mib']:>9.0f}  {found['reduced']['mib']:>11.0f}  {found['reduced']['whole_mib']:>17.0f}\n"
        )
        sys.stdout.flush()


def _in_a_process(given: argparse.Namespace, length: int, way: str) -> dict[str, float]:
    options = ["--model", given.model, "--one", str(length), "--way", way, "--rounds", str(given.rounds)]
    done = subprocess.run([sys.executable, __file__, *options], check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(model: LiveModel, length: int, rounds: int, way: str) -> dict[str, float]:
    """Least seconds of either pass; or of one of them, the MiB by which the process's peak rises over what it held before."""
    heads = 0

    def receive(_: Site, slices: PatternSlices) -> None:
        nonlocal heads
        heads = slices.heads
        real = torch.ones(slices.rows, slices.queries, dtype=torch.bool, device=slices.device)
        reduce_pattern(slices, real, padded=False)

    def plain(tokens: int = length) -> None:
        ids = torch.randint(0, model.anatomy.vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
        model.module(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1)

    def reduced(tokens: int = length) -> None:
        with attention_reduced(model, None, receive):
            plain(tokens)

    if way == "times":
        times = [(_seconds(plain), _seconds(reduced)) for _ in range(rounds)]
        least = [min(column) for column in zip(*times, strict=True)]
        return {"plain": least[0], "reduced": least[1]}
    run = plain if way == "plain" else reduced
    with torch.no_grad():
        run(16)  # what is loaded once is no part of the peak
    return {"mib": _raised(run), "whole_mib": 4 * heads * length**2 / 2**20}


def _seconds(run: Callable[[], None]) -> float:
    with torch.no_grad():
        started = time.perf_counter()
        run()
        return time.perf_counter() - started


def _raised(run: Callable[[], None]) -> float:
    """MiB by which a run raises the peak over what is resident before it."""
    with open("/proc/self/clear_refs", "w") as file:  # the peak starts again from what is resident now
        file.write("5")
    before = _status("VmRSS")
    _seconds(run)
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> float:
    with open("/proc/self/status") as file:
        return next((float(line.split()[1]) for line in file if line.startswith(name)), 0.0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--way", default="times", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
