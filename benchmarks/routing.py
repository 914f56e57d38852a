"""What the analyses of routing cost on a large run, beside plain NumPy in the same process.

    .venv/bin/python benchmarks/routing.py [--tokens 200000] [--layers 16] [--experts 64] [--top-k 8] [--length 512]
                                           [--store FILE --run NAME] [--only NAME …] [--logits]

Three tables, in Markdown. The first: segment performance at four lengths and every cache policy at every size (in a pool of
all layers, LRU at every size and the others at 32), then the same with controls and bootstrap, at a quarter, a half and the
whole of the run; growth is CPU time of the whole over the quarter's, so 4.0 is linear. The second: each against a plain NumPy
version on the same tokens, with the same answer checked. The third: every other registered analysis with its defaults.
Everything is compiled beforehand on a small run. Peak memory is the process's highest resident size during the row, decisions
included.

Runs are made of random numbers (`synthetic_run.py`); with --store and --run the whole one is read from a file instead.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from synthetic_run import SyntheticRun

import moescope as ms
from moescope.core.analysis import analyses
from moescope.core.errors import MoescopeError
from moescope.routing import trace as traces
from moescope.routing.caching.expert_cache import pool_sizes
from moescope.routing.caching.hit_rates import replay_all
from moescope.routing.caching.replay import POLICIES, POLICY_NAMES, Rule, replay
from moescope.routing.caching.streams import layer_streams, pool_stream, sequences_of
from moescope.routing.trace import Trace, read_trace
from moescope.store.run import Run

SEGMENTS = (4, 16, 64, 256)
TESTS = Path(__file__).parents[1] / "tests" / "routing"
SHARES = (0.25, 0.5, 1.0)
NUMPY_SEQUENCES = 24  # enough for NumPy to be busy, few enough to be waited for


def main() -> None:
    given = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        runs = _runs(given, Path(folder))
        small, whole = runs[0], runs[-1]
        print(f"Run: {_size(whole)}.\n")
        print("## Local consistency and caches\n")
        works = _works()
        for work in works.values():
            work(small)
        _table(works, runs[1:], given.only)
        print("\n## Beside plain NumPy\n")
        _beside_numpy(read_trace(whole), given.only)
        print("\n## Every other analysis, with its defaults\n")
        names = [name for name in analyses.names() if name not in ("local_consistency", "expert_cache")]
        _table(_defaults(names, small), runs[1:], given.only)


def _arguments() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 200_000), ("layers", 16), ("experts", 64), ("top-k", 8), ("length", 512)):
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--logits", action="store_true", help="record router logits and output norms too")
    options.add_argument("--only", nargs="*", default=None, help="rows whose name contains one of these")
    options.add_argument("--store", type=Path, help="read the whole run from this file")
    options.add_argument("--run", default="big", help="its name there")
    return options.parse_args()


def _runs(given: argparse.Namespace, folder: Path) -> list[Run]:
    """A small run to compile on, then a quarter, a half and the whole."""
    store = ms.Store(folder / "runs.duckdb")
    shape = {"layers": given.layers, "experts": given.experts, "top_k": given.top_k, "length": given.length}
    shape |= {"logits": given.logits, "norms": given.logits}
    made = [("small", min(given.tokens, 10 * given.length))]
    shares = SHARES[:-1] if given.store else SHARES
    made += [(f"{share:g}", int(given.tokens * share)) for share in shares]
    runs = [SyntheticRun(tokens, **shape).write(store, name) for name, tokens in made]
    return runs + ([ms.Store(given.store, read_only=True).run(given.run)] if given.store else [])


def _size(run: Run) -> str:
    trace = read_trace(run)
    return f"{trace.tokens:,} tokens × {len(trace.routers)} routers, {trace.decisions / 1e6:.1f} M decisions"


def _works() -> dict[str, Callable[[Run], Any]]:
    """Rows of the first table: the sum of the two first is the target of 12 s, of the two last of 30 s more."""
    every = ",".join(map(str, SEGMENTS))
    return {
        "read the decisions": _read_anew,
        "SRP, four lengths": lambda run: ms.analyze(run, "local_consistency", segments=every, shuffles=0, draws=1),
        "caches: a layer, all policies, all sizes": _layer_caches,
        "caches: one pool, all policies": _pool_caches,
        "local_consistency, four lengths, controls and bootstrap": lambda run: ms.analyze(
            run, "local_consistency", segments=every
        ),
        "expert_cache, controls and bootstrap": lambda run: ms.analyze(run, "expert_cache"),
        "expert_cache, pool=model, controls and bootstrap": lambda run: ms.analyze(run, "expert_cache", pool="model"),
    }


def _read_anew(run: Run) -> Trace:
    traces._kept.clear()
    return read_trace(run)


def _layer_caches(run: Run) -> None:
    trace = read_trace(run)
    for policy in POLICIES:
        replay_all(layer_streams(trace), sequences_of(trace), Rule(policy))


def _pool_caches(run: Run) -> None:
    trace = read_trace(run)
    stream = pool_stream(trace)
    for policy in POLICIES:
        sizes = None if policy == "lru" else pool_sizes(trace, stream, stream.experts)
        replay_all([stream], sequences_of(trace), Rule(policy), sizes=sizes)


def _defaults(names: Iterable[str], small: Run) -> dict[str, Callable[[Run], Any]]:
    """The analyses the run has records for, compiled; what is refused is said."""
    works: dict[str, Callable[[Run], Any]] = {}
    refused = []
    for name in names:

        def work(run: Run, name: str = name) -> Any:
            return ms.analyze([run] * analyses[name].runs, name)

        try:
            work(small)
        except MoescopeError:
            refused.append(name)
        else:
            works[name] = work
    if refused:
        print("Without what they need in this run:", ", ".join(refused), "\n")
    return works


def _table(works: dict[str, Callable[[Run], Any]], runs: list[Run], only: list[str] | None) -> None:
    sizes = " | ".join(f"{share:g} of the run, s" for share in SHARES)
    print(f"| work | {sizes} | growth | CPU of the whole, s | peak memory, GB |\n|---|{'---|' * (len(SHARES) + 3)}")
    total = np.zeros(len(runs))
    for name, work in works.items():
        if only is not None and not any(part in name for part in only):
            continue
        seconds, busy = [], []
        for run in runs:
            read_trace(run)
            _forget_peak()
            before, started = time.process_time(), time.perf_counter()
            work(run)
            seconds.append(time.perf_counter() - started)
            busy.append(time.process_time() - before)
        total += seconds
        cells = " | ".join(f"{second:.2f}" for second in seconds)
        growth = busy[-1] / max(busy[0], 1e-9)
        print(f"| {name} | {cells} | {growth:.1f} | {busy[-1]:.2f} | {_peak_gb():.2f} |", flush=True)
    print(f"| sum | {' | '.join(f'{second:.2f}' for second in total)} | | | |")


def _beside_numpy(trace: Trace, only: list[str] | None) -> None:
    """Ours and NumPy's on the first sequences of the first router, whose answers must be the same."""
    caches, segments = _module("caching/numpy_caches.py"), _module("consistency/numpy_reference.py")
    sequences = sequences_of(trace).part(0, min(NUMPY_SEQUENCES, len(trace.sequence_ids)))
    stream = layer_streams(trace)[0]
    ids, starts = stream.ids[: sequences.starts[-1]], sequences.starts
    print(f"{starts[-1]:,} tokens of {stream.name}, one core each.\n")
    print("| work | moescope, s | NumPy, s | times as fast |\n|---|---|---|---|")
    for policy in POLICIES:
        if only is not None and policy not in only:
            continue
        part = stream.at(np.arange(starts[-1]))
        weight, sizes = np.ones(len(sequences.row)), np.arange(1, stream.experts + 1)
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            found = replay(part, sequences, weight, Rule(policy), sizes)
            seconds.append(time.perf_counter() - started)
        ours = min(seconds)
        started = time.perf_counter()
        hits = caches.hits_by_size(ids, stream.experts, starts, policy)
        theirs = time.perf_counter() - started
        assert np.array_equal(found.sum(0), hits), policy
        print(
            f"| {POLICY_NAMES[policy]}, {stream.experts} sizes | {ours:.4f} | {theirs:.2f} | {theirs / ours:,.0f} |",
            flush=True,
        )
    if only is None or "SRP" in only:
        _srp_beside_numpy(trace, segments)


def _srp_beside_numpy(trace: Trace, segments: ModuleType) -> None:
    """All routers and tokens, the model's SRP."""
    started = time.perf_counter()
    frame = ms.analyze(trace.run, "local_consistency", segments=",".join(map(str, SEGMENTS)), shuffles=0, draws=1).df()
    ours = time.perf_counter() - started
    started = time.perf_counter()
    routers = [(router.experts, router.n_experts) for router in trace.routers]
    expected = segments.srp(routers, trace.starts, SEGMENTS)
    theirs = time.perf_counter() - started
    found = frame[frame["metric"] == "SRP"].set_index("segment")["value"]
    assert all(abs(found[m] - expected[m]) < 1e-9 for m in SEGMENTS), (found, expected)
    print(
        f"| SRP, four lengths, all routers and tokens | {ours:.2f} | {theirs:.2f} | {theirs / ours:,.1f} |", flush=True
    )


def _module(file: str) -> ModuleType:
    path = TESTS / file
    spec = importlib.util.spec_from_file_location(f"moescope_benchmark_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _forget_peak() -> None:
    """Let Linux count the highest resident size from here."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_gb() -> float:
    """The highest resident size since `_forget_peak`, where Linux tells it; NaN elsewhere."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1e6
    return float("nan")


if __name__ == "__main__":
    main()
