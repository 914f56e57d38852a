"""What a store costs: decisions written a second, bytes a decision, and seconds for named questions, as runs grow.

    .venv/bin/python benchmarks/store.py [--decisions 3e6,30e6,130e6] [--rounds 3] [--trace FOLDER] [--plots]

Rows of a made-up model (16 layers, top-8 of 64, float32 softmax weights, margin, entropy; see `synthetic_run.py`) lie in
memory as Arrow tables before the clock starts. They are then written as a recording's are, through `RunWriter`; "committed"
ends with the last transaction, "closed" with the ledger settled and the file closed. Then every question of
`store_queries.py` is asked of the file: "cold" in a process that has just begun, of a file that the system has been asked to
drop from its page cache (`posix_fadvise`; nothing else is dropped), opening it included; "warm" is the best of three more
times. Of all times the least of the rounds counts. `--trace` imports the routing traces (`*.parquet`) of a folder through
`Store.import_trace`, each as it is and once more with its sequences repeated. `--plots` writes cost against size into
`benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from store_queries import QUERIES
from synthetic_run import SyntheticRun

from moescope.core.figures import SERIES
from moescope.store.store import Store
from moescope.store.writer import RunWriter

RESULTS = Path(__file__).parent / "results"
_ASKED = {"layer": 5, "expert": 7, "token": 3_000, "sequence": 5}
_BLOCKS = """
    SELECT count(DISTINCT block) * 262144
    FROM (
        SELECT unnest(list_append(additional_block_ids, block_id)) AS block
        FROM pragma_storage_info('routing')
        WHERE persistent
    )
    WHERE block >= 0
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--decisions", default="3e6,30e6", help="sizes, with commas between them")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--cores", type=int, default=2, help="that this may use, DuckDB's threads included")
    options.add_argument("--trace", type=Path, help="folder of real routing traces, *.parquet")
    options.add_argument("--repeat", type=int, default=12, help="copies of the trace's sequences")
    options.add_argument("--plots", action="store_true")
    options.add_argument("--ask", nargs=2, metavar=("QUERY", "PATH"), help=argparse.SUPPRESS)
    given = options.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])
    if given.ask:
        print(json.dumps(_asked(given.ask[0], Path(given.ask[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        found = [_measured(int(float(size)), Path(folder), given.rounds) for size in given.decisions.split(",")]
        _tell(found)
        if given.trace:
            _tell_imports(given.trace, given.repeat, Path(folder), given.rounds)
    if given.plots:
        _plot(found)


def _measured(decisions: int, folder: Path, rounds: int) -> dict[str, Any]:
    run = SyntheticRun(max(4096, decisions // 128))
    print(f"making {run.decisions:,} decisions …", file=sys.stderr)
    batches = list(run.batches())
    path = folder / f"{decisions}.duckdb"
    best: dict[str, float] = {}
    for _ in range(rounds):
        path.unlink(missing_ok=True)
        _keep_least(best, _ingested(run, batches, path))
    with Store(path, read_only=True) as store:
        in_routing = store.fetch(_BLOCKS)[0][0]
    del batches
    found = {"decisions": run.decisions, "ingest": best, "bytes": path.stat().st_size, "routing_bytes": in_routing}
    found["queries"] = {}
    for name in QUERIES:
        times: dict[str, float] = {}
        for _ in range(rounds):
            _keep_least(times, _cold(name, path))
        found["queries"][name] = times
    path.unlink()
    return found


def _keep_least(best: dict[str, float], times: dict[str, float]) -> None:
    for name, seconds in times.items():
        best[name] = min(seconds, best.get(name, seconds))


def _ingested(run: SyntheticRun, batches: list[Any], path: Path) -> dict[str, float]:
    started, processor = time.perf_counter(), time.process_time()
    with Store(path) as store:
        made = run.begin(store, "synthetic")
        writer = RunWriter(store, made.run_id)
        for batch in batches:
            writer.submit(lambda batch=batch: batch)
        writer.close()
        committed, worked = time.perf_counter() - started, time.process_time() - processor
        run.end(store, made)
        assert made.complete, made.coverage
    return {"committed": committed, "processor": worked, "closed": time.perf_counter() - started}


def _cold(name: str, path: Path) -> dict[str, float]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    done = subprocess.run(
        [sys.executable, __file__, "--ask", name, str(path)], capture_output=True, text=True, check=True
    )
    times: dict[str, float] = json.loads(done.stdout)
    return times


def _asked(name: str, path: Path) -> dict[str, float]:
    used = {key: value for key, value in _ASKED.items() if f"${key}" in QUERIES[name]}

    def ask() -> None:
        assert run.sql(QUERIES[name], used).to_arrow_table().num_rows

    started = time.perf_counter()
    with Store(path, read_only=True) as store:
        run = store.run("synthetic")
        opened = time.perf_counter() - started
        ask()
        cold = time.perf_counter() - started
        return {"open": opened, "cold": cold, "warm": min(_seconds(ask) for _ in range(3))}


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _tell(found: list[dict[str, Any]]) -> None:
    heads = [f"{one['decisions'] / 1e6:.0f} M" for one in found]
    print("| decisions | " + " | ".join(heads) + " |\n|---|" + "---|" * len(found))
    for name, says in (("committed", "wall"), ("processor", "processor"), ("closed", "wall, ledger and closing too")):
        rates = [f"{one['decisions'] / one['ingest'][name] / 1e6:.1f} M" for one in found]
        print(f"| written a second ({says}) | " + " | ".join(rates) + " |")
    for name, says in (("routing_bytes", "table routing"), ("bytes", "whole file, texts and totals too")):
        print(f"| bytes a decision ({says}) | " + " | ".join(f"{o[name] / o['decisions']:.2f}" for o in found) + " |")
    print("\n| milliseconds, cold / warm | " + " | ".join(heads) + " |\n|---|" + "---|" * len(found))
    for query in QUERIES:
        cells = [f"{1e3 * o['queries'][query]['cold']:.0f} / {1e3 * o['queries'][query]['warm']:.0f}" for o in found]
        print(f"| {query} | " + " | ".join(cells) + " |")


def _tell_imports(traces: Path, copies: int, folder: Path, rounds: int) -> None:
    print("\n| trace | decisions | imported a second | bytes a decision, routing | whole file |\n|---|---|---|---|---|")
    for trace in sorted(traces.glob("*.parquet")):
        for times in (1, copies):
            print(f"| {trace.stem}{f' × {times}' if times > 1 else ''} | {_imported(trace, times, folder, rounds)} |")


def _imported(trace: Path, copies: int, folder: Path, rounds: int) -> str:
    """The trace, its sequences so many times over, as a file of the neutral form; and what its import takes."""
    import duckdb

    given, path, best = folder / "trace.parquet", folder / "trace.duckdb", float("inf")
    with duckdb.connect() as connection:
        repeated = """
            SELECT sequence_id + copy * (SELECT 1 + max(sequence_id) FROM given) AS sequence_id, * EXCLUDE (sequence_id)
            FROM given, (SELECT unnest(range($copies)) AS copy)
        """
        connection.read_parquet(str(trace)).create_view("given")
        connection.sql(repeated, params={"copies": copies}).project("* EXCLUDE (copy)").write_parquet(str(given))
    for _ in range(rounds):
        path.unlink(missing_ok=True)
        with Store(path) as store:
            started = time.perf_counter()
            run = store.import_trace(given, name="trace", n_experts=64)
            best = min(best, time.perf_counter() - started)
            decisions = run.sql("SELECT sum(len(experts)) FROM routing WHERE run_id = $run").fetchall()[0][0]
    with Store(path, read_only=True) as store:
        in_routing = store.fetch(_BLOCKS)[0][0]
    sizes = f"{in_routing / decisions:.2f} | {path.stat().st_size / decisions:.2f}"
    return f"{decisions:,} | {decisions / best / 1e6:.1f} M | {sizes}"


def _plot(found: list[dict[str, Any]]) -> None:
    """Cost against size, as HTML and, where a browser is installed that draws it, as PNG."""
    import plotly.graph_objects as go

    sizes = [one["decisions"] for one in found]
    figure = go.Figure()
    for name in ("committed", "closed"):
        figure.add_scatter(x=sizes, y=[one["ingest"][name] for one in found], name=f"written, {name}", line_width=4)
    for number, query in enumerate(QUERIES):
        again, colour = divmod(number, len(SERIES))
        line = {"color": SERIES[colour], "dash": "dash" if again else "solid"}
        figure.add_scatter(x=sizes, y=[one["queries"][query]["cold"] for one in found], name=query, line=line)
    figure.update_traces(mode="lines+markers")
    figure.update_traces(line_color="#333333", selector={"name": "written, committed"})
    figure.update_traces(line_color="#999999", selector={"name": "written, closed"})
    figure.update_xaxes(type="log", title="decisions", dtick=1)
    figure.update_yaxes(type="log", title="seconds, cold", dtick=1)
    figure.update_layout(title="Cost against size", template="plotly_white", width=1000, height=700)
    RESULTS.mkdir(exist_ok=True)
    figure.write_html(RESULTS / "store.html", include_plotlyjs=True)
    figure.write_image(RESULTS / "store.png", scale=2)


if __name__ == "__main__":
    main()
