"""A cold browser that tells when a page showed what: the clock runs in the page, from the start of its navigation."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1440,900",
)  # fmt: skip
# Tests are written into the script: the page's policy lets nothing be compiled from text.
_WATCH = """
    window.marks = {};
    ((wanted) => {
      (function look() {
        for (const [name, test] of Object.entries(wanted)) {
          if (name in window.marks) continue;
          let value = false;
          try { value = Boolean(test()); } catch (error) { value = false; }
          if (value) window.marks[name] = performance.now();
        }
        requestAnimationFrame(look);
      })();
    })({%s});
"""
_ACT = """
    const limit = arguments[0], done = arguments[arguments.length - 1];
    const act = () => { %s }, check = () => { %s };
    let begun = 0, longest = 0, last = 0;
    window.before = {};
    check();  // remembers how it is
    requestAnimationFrame(() => {
      begun = last = performance.now();
      act();
      (function look() {
        const now = performance.now();
        longest = Math.max(longest, now - last);
        last = now;
        let value = false;
        try { value = Boolean(check()); } catch (error) { value = false; }
        if (value || now - begun > limit) done([value, now - begun, longest]);
        else requestAnimationFrame(look);
      })();
    });
"""
_FIRST_TEXT = "return performance.getEntriesByName('first-contentful-paint').map((e) => e.startTime)[0] ?? null"


class ColdBrowser:
    """Chromium with an empty profile; nothing of an earlier page is left in it."""

    def __init__(self) -> None:
        from selenium import webdriver

        self._profile = tempfile.mkdtemp()
        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        for flag in (*_FLAGS, f"--user-data-dir={self._profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.ChromeService(str(shutil.which("chromedriver")))
        self.driver = webdriver.Chrome(options=options, service=service)
        self.driver.set_script_timeout(40)
        size = {"width": 1440, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get("about:blank")
        self.driver.get_log("performance")  # of the browser's own first page

    def __enter__(self) -> ColdBrowser:
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.quit()
        shutil.rmtree(Path(self._profile), ignore_errors=True)

    def load(self, url: str, wanted: dict[str, str], *, seconds: float = 30) -> dict[str, float | None]:
        """Go to a page; milliseconds to first text and to each of the wanted states, None for one that never came."""
        tests = ", ".join(f"{json.dumps(name)}: () => ({test})" for name, test in wanted.items())
        self.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": _WATCH % tests})
        self.driver.get(url)
        marks = self._wait(len(wanted), seconds)
        found = {"first text": self.driver.execute_script(_FIRST_TEXT)}
        return found | {name: marks.get(name) for name in wanted}

    def act(self, action: str, test: str, *, seconds: float = 15) -> tuple[bool, float, float]:
        """Do something on the page; whether the test came true, after how many milliseconds, and the longest frame.

        The test is a function's body; it runs once before the action, and may remember things in `window.before`.
        """
        script = _ACT % (action, test)
        happened, took, longest = self.driver.execute_async_script(script, 1000 * seconds)
        return bool(happened), float(took), float(longest)

    def transferred(self) -> int:
        """Bytes that came over the wire so far, headers and compressed bodies; what is under way is waited for."""
        time.sleep(1.0)
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return sum(int(m["params"]["encodedDataLength"]) for m in messages if m["method"] == "Network.loadingFinished")

    def complaints(self) -> list[str]:
        """Errors and warnings in the console."""
        return [e["message"] for e in self.driver.get_log("browser") if e["level"] in {"SEVERE", "WARNING"}]

    def _wait(self, states: int, seconds: float) -> dict[str, Any]:
        end = time.monotonic() + seconds
        marks: dict[str, Any] = {}
        while time.monotonic() < end and len(marks) < states:
            time.sleep(0.1)
            marks = self.driver.execute_script("return window.marks || {}")
        return marks
