"""A dashboard in a process of its own, whose memory can be looked at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_SERVE = (
    "import sys; from moescope.dashboard.serve import serve; "
    "serve(sys.argv[1], port=0, ready=lambda url, server: print(url, flush=True))"
)


class Served:
    """A store, served until the end of the `with` block."""

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen([sys.executable, "-c", _SERVE, str(path)], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip().rstrip("/")
        if not self.url:
            raise SystemExit("the dashboard did not start")

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(10)

    def peak_mb(self) -> float:
        """Most memory that it ever held, in MB."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
