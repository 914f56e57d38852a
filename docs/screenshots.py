"""Takes the pictures of docs/dashboard.md: every page of the dashboard, from a recorded store, in headless Chromium.

    python docs/screenshots.py STORE [--out docs/images] [--page NAME …] [--dark]

A page that a run of the store fills best is shown from that run; what is selected there is in `VIEWS`.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from moescope.core.pages import pages
from moescope.dashboard.serve import serve
from moescope.store.store import Store

WIDTH, HEIGHT, MOST = 1440, 900, 1500
LARGEST = 300_000  # bytes of a picture
_LOG = logging.getLogger("screenshots")
_SETTLED = """
    return !document.body.innerText.includes('Waiting for the model')
        && !document.querySelector('.waiting, .panel-body [class*=Skeleton]')
        && document.querySelector('.page h1')
        && [...document.querySelectorAll('.panel')].every((one) => one.getBoundingClientRect().top > 1300
            || one.querySelector('.panel-answer, .refusal'))
"""

# Page → what its picture shows. A run that the store does not have is left out, and what belongs to it.
VIEWS: dict[str, dict[str, str]] = {
    "/compare": {"run": "demo", "other": "cut"},
    "/features": {"run": "study"},
    "/experts": {"layer": "3", "expert": "7"},
    "/tokens": {"layer": "3"},
    "/phenomena": {"run": "phenomena", "layer": "1", "head": "0"},
    "/lab": {"edits": "ablate layer=3 experts=5"},
    "/sql": {"sql": "SELECT layer, expert, sum(tokens) AS tokens\nFROM loads\nGROUP BY ALL\nORDER BY tokens DESC"},
    "/analyses": {"analysis": "local_consistency"},
}


def main() -> None:
    """Take the pictures the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    parser.add_argument("--page", action="append", help="only this page, by its path; may be repeated")
    parser.add_argument(
        "--run", help="the run to show where a page has none of its own; the newest complete one without it"
    )
    parser.add_argument("--dark", action="store_true", help="in dark colours, as NAME-dark.png")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    given.out.mkdir(parents=True, exist_ok=True)
    chosen = [page for page in pages if not given.page or page.path in given.page]
    with Store(given.store, read_only=True) as store:
        runs = {run.name for run in store.runs()}
    with _served(given.store) as url, _browser(dark=given.dark) as driver:
        for page in sorted(chosen, key=lambda one: (one.group, one.order)):
            target = given.out / f"{page.path.strip('/') or 'overview'}{'-dark' if given.dark else ''}.png"
            target.write_bytes(picture(driver, url + address(page.path, given.run, runs)))
            size = target.stat().st_size
            _LOG.info("%s %d kB%s", target, size // 1000, "" if size <= LARGEST else "  TOO LARGE")


def address(path: str, run: str | None, runs: set[str]) -> str:
    """A page with what its picture shows."""
    wanted = VIEWS.get(path, {})
    there = {wanted[name] for name in ("run", "other") if name in wanted} <= runs
    values = ({"run": run} if run else {}) | (wanted if there else {})
    return path + ("?" + urlencode(values) if values else "")


def picture(driver: Any, url: str) -> bytes:
    """The page once everything in view is there, as high as it is, cut at `MOST`."""
    _size(driver, HEIGHT)
    driver.get(url)
    end = time.monotonic() + 90
    while time.monotonic() < end and not driver.execute_script(_SETTLED):
        time.sleep(0.2)
    height = driver.execute_script("return document.querySelector('.content').scrollHeight + 60")
    _size(driver, max(HEIGHT, min(MOST, height)))
    time.sleep(2.5)  # figures take their new width
    image: bytes = driver.get_screenshot_as_png()
    return smaller(image)


def smaller(png: bytes) -> bytes:
    """The same picture with its data compressed again, as hard as zlib can."""
    data, head, at = b"", png[:8], 8
    kept: list[bytes] = []
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        kind, body = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        at += 12 + length
        if kind == b"IDAT":
            data += body
        elif kind in {b"IHDR", b"PLTE", b"tRNS"}:
            kept.append(_chunk(kind, body))
    packed = zlib.compress(zlib.decompress(data), 9)
    return head + b"".join([*kept, _chunk(b"IDAT", packed), _chunk(b"IEND", b"")])


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _size(driver: Any, height: int) -> None:
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False},
    )


@contextmanager
def _served(path: Path) -> Iterator[str]:
    """The dashboard over a store that is only read, on a free port."""
    with Store(path, read_only=True):
        pass  # a store that cannot be opened is said here, not in the thread
    up, seen = threading.Event(), dict[str, Any]()

    def ready(url: str, server: Any) -> None:
        seen.update(url=url, server=server)
        up.set()

    options: dict[str, Any] = {"port": 0, "read_only": True, "ready": ready}
    thread = threading.Thread(target=serve, args=(path,), kwargs=options, daemon=True)
    thread.start()
    if not up.wait(120):
        raise TimeoutError(f"the dashboard over {path} did not come up")
    try:
        yield str(seen["url"]).rstrip("/")
    finally:
        seen["server"].shutdown()
        thread.join(20)


@contextmanager
def _browser(*, dark: bool) -> Iterator[Any]:
    """A headless Chromium with a profile of its own."""
    from selenium import webdriver

    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(shutil.which("chromedriver"))))
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        try:
            yield driver
        finally:
            driver.quit()


if __name__ == "__main__":
    main()
