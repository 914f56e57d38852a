"""Grounds that give way: a real small disk that fills, a log torn off by a power cut, a clock that jumps while recording."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from moescope.store.run import Run
from moescope.store.store import Store, forget_begun
from moescope.store.writer import BatchRecords, RunWriter

FULL_DISK = Path(__file__).parent / "full_disk.py"
SIZES = {
    "recording": "16m", "vectors": "16m", "making": "16m", "importing": "16m", "merging": "64m", "compacting": "64m",
}  # fmt: skip
_MOUNT = 'mount -t tmpfs -o size="$1" none "$2" && shift && exec "${@:2}"'


def _on_a_small_disk(folder: Path, size: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process that alone sees a tmpfs of that size at `folder`; it is gone with the process."""
    apart = ["unshare", "--map-root-user", "--mount", "bash", "-c", _MOUNT, "bash", size, str(folder), *command]
    return subprocess.run(apart, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def small_disks(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where the system lets nobody mount, there is nothing to test on."""
    folder = tmp_path_factory.mktemp("mount")
    if not shutil.which("unshare") or _on_a_small_disk(folder, "1m", "true").returncode != 0:
        pytest.skip("this system does not let a process mount a tmpfs of its own")


@pytest.mark.usefixtures("small_disks")
@pytest.mark.parametrize("scenario", SIZES)
def test_disk_that_fills_is_told_and_what_was_committed_stays_whole(scenario: str, tmp_path: Path) -> None:
    done = _on_a_small_disk(tmp_path, SIZES[scenario], sys.executable, str(FULL_DISK), scenario, str(tmp_path))
    assert done.returncode == 0, done.stderr


def _recorded(store: Store, name: str, batches: int) -> Run:
    """Batches of three sequences of 40 tokens, each a transaction of its own."""
    run = store.begin_run(name=name)
    writer = RunWriter(store, run.run_id, chunk_rows=1)
    for number in range(batches):
        token = np.arange(number * 120, (number + 1) * 120)
        sequence = number * 3 + np.arange(3)
        tables = {
            "tokens": pa.table({"token": token, "sequence_id": np.repeat(sequence, 40)}),
            "sequences": pa.table({"sequence_id": sequence, "n_tokens": pa.array([40] * 3, pa.int32())}),
        }
        writer.submit(lambda n=number, t=tables: BatchRecords(n, (3 * n, 3, 120), t))  # type: ignore[misc]
    writer.close()
    return run


def test_log_torn_off_anywhere_leaves_whole_batches(path: Path, tmp_path: Path) -> None:
    with Store(path) as store:
        store.connection.execute("CHECKPOINT")
        forget_begun(_recorded(store, "base", 12))
        log = Path(f"{path}.wal").read_bytes()
        file = path.read_bytes()
    kept = []
    for number, share in enumerate(np.linspace(0.02, 1.0, 15)):
        torn = tmp_path / f"torn {number}.duckdb"
        torn.write_bytes(file)
        Path(f"{torn}.wal").write_bytes(log[: int(share * len(log))])
        with Store(torn) as store:
            found = store.fetch(
                """
                SELECT
                    (SELECT count(*) FROM batches), (SELECT count(*) FROM tokens), (SELECT count(*) FROM sequences),
                    (SELECT coalesce(sum(n), 0) FROM (SELECT count(DISTINCT sequence_id) AS n FROM tokens)),
                    (SELECT count(*) FROM runs WHERE status = 'incomplete')
                """
            )
        batches, *rest = found[0]
        assert rest[:3] == [120 * batches, 3 * batches, 3 * batches]
        assert rest[3] == 1 or not batches
        kept.append(batches)
    assert kept == sorted(kept)
    assert kept[0] < kept[-1] == 12


def test_clock_that_jumps_while_recording_loses_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    jumps = itertools.cycle([0.0, 4e9, -1e6, 5.0])
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    run = _recorded(store, "base", 6)
    assert store.fetch("SELECT batch FROM batches ORDER BY batch") == [(n,) for n in range(6)]
    assert run.rows("tokens") == 6 * 120
