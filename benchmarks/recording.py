"""What recording costs: plain forward passes and whole recorded runs in turn, in one process.

    .venv/bin/python benchmarks/recording.py [--rounds 5] [--model demo] [--data corpus.jsonl]

Prints tokens a second of both, the ratio of each round's pair, and the peak memory of the process. A recorded run counts
everything from the first batch to the settled ledger: tokenising, forward passes, losses, rows, transactions.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import moescope as ms
from moescope.probes.forward import time_plain
from moescope.probes.record import Recording

PROBES = {
    "tokens": ["tokens"],
    "tokens + routing": ["tokens", "routing"],
    "tokens + routing + experts": ["tokens", "routing", "experts"],
    "default four": None,
}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--model", default="demo")
    options.add_argument("--data", default="demo")
    given = options.parse_args()
    model, corpus = ms.load(given.model), ms.Corpus.load(given.data)
    choices = PROBES if model.anatomy.moe else {"tokens": ["tokens"], "default two": None}
    speeds: dict[str, list[float]] = {name: [] for name in ["plain forward", *choices]}
    ratios: dict[str, list[float]] = {name: [] for name in choices}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(given.rounds + 1):  # the first round warms up and is not counted
            with ms.Store(Path(folder) / f"{number}.duckdb") as store:
                for name, probes in choices.items():
                    recording = Recording(
                        model, corpus, store, name=name, probes=probes, batch_size=8, max_length=512, seed=0
                    )
                    plain = time_plain(model, recording.plan)
                    started = time.perf_counter()
                    run = recording.run(progress=False)
                    seconds = time.perf_counter() - started
                    plain = (plain + time_plain(model, recording.plan)) / 2
                    if number:
                        tokens = run.info["summary"]["tokens"]
                        speeds["plain forward"].append(tokens / plain)
                        speeds[name].append(tokens / seconds)
                        ratios[name].append(plain / seconds)
    print(f"{'':<28}{'tokens/s, median':>18}{'÷ plain: min':>14}{'median':>8}{'max':>7}")
    for name, values in speeds.items():
        pairs = ratios.get(name)
        spread = f"{min(pairs):>14.2f}{statistics.median(pairs):>8.2f}{max(pairs):>7.2f}" if pairs else ""
        print(f"{name:<28}{statistics.median(values):>18,.0f}{spread}")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:,.0f} MiB")


if __name__ == "__main__":
    main()
