"""How long the lab takes from the last movement of a slider to the painted edited table, in a headless browser on the demo model.

python benchmarks/lab.py --moves 40
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from moescope.dashboard.serve import serve
from moescope.store.store import Store

EDIT = "ablate+layer=3+experts=0-7"
_MOVE = """
const slider = document.querySelector('.lab-slider');
slider.value = arguments[0];
slider.dispatchEvent(new Event('input', {bubbles: true}));
return window.moescope_lab.stamp;
"""
_TOOK = (
    "return window.moescope_lab.stamp > arguments[0] ? window.moescope_lab.painted - window.moescope_lab.moved : null"
)


def browser(folder: Path) -> Any:
    """The headless browser of the tests."""
    path = Path(__file__).parents[1] / "tests" / "ui" / "conftest.py"
    spec = importlib.util.spec_from_file_location("ui_conftest", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ui_conftest"] = module
    spec.loader.exec_module(module)
    return module.Browser(folder, width=1440, height=900)


def measured(url: str, folder: Path, moves: int) -> list[float]:
    """Milliseconds of each move; the answer of one is painted before the next begins."""
    shown = browser(folder)
    try:
        shown.driver.get(f"{url}/lab?edits={EDIT}")
        shown.wait("return document.querySelector('table[data-side=edited]') !== null", 120)
        time.sleep(2)  # what the model writes comes after
        took = []
        for move in range(moves):
            before = shown.js(_MOVE, round(0.1 + 0.05 * (move % 17), 2))
            found, end = None, time.monotonic() + 20
            while found is None and time.monotonic() < end:
                time.sleep(0.05)
                found = shown.js(_TOOK, before)
            if found is None:
                raise SystemExit("the edited table was not painted within 20 s")
            took.append(float(found))
        return took
    finally:
        shown.driver.quit()


def main() -> None:
    """Serve an empty store with the demo model, move the slider, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moves", type=int, default=40)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        Store(folder / "runs.duckdb").close()
        up, seen = threading.Event(), {}

        def ready(url: str, server: Any) -> None:
            seen.update(url=url, server=server)
            up.set()

        options = {"port": 0, "ready": ready, "model": "demo"}
        thread = threading.Thread(target=serve, args=(folder / "runs.duckdb",), kwargs=options, daemon=True)
        thread.start()
        up.wait(60)
        took = measured(seen["url"].rstrip("/"), folder / "profile", asked.moves)
        seen["server"].shutdown()
        thread.join(10)
    ordered = sorted(took)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    found = {"moves": len(took), "median_ms": statistics.median(took), "p95_ms": p95, "max_ms": ordered[-1]}
    sys.stdout.write(json.dumps({name: round(value, 1) for name, value in found.items()}) + "\n")


if __name__ == "__main__":
    main()
