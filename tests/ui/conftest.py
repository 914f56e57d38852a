"""A headless Chromium and served stores; tests that need them are skipped, with the reason, where there is no Chromium."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moescope.dashboard.serve import serve
from moescope.store.store import Store

_SPEC = importlib.util.spec_from_file_location("planted", Path(__file__).parents[1] / "dashboard" / "planted.py")
assert _SPEC is not None
assert _SPEC.loader is not None
planted: Any = importlib.util.module_from_spec(_SPEC)
sys.modules["planted"] = planted
_SPEC.loader.exec_module(planted)

_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


_SETTLED = """
return (() => {
  if (!document.querySelector('.page-title')) return false;
  const state = window.store.getState();
  const busy = ['prioritized', 'requested', 'blocked', 'executing', 'watched'].some((kind) => state.callbacks[kind].length);
  return !busy && !state.isLoading && !document.querySelector('[data-dash-is-loading=true]');
})()
"""


class Browser:
    """A browser that remembers what its pages asked for and complained about."""

    def __init__(self, profile: Path, *, width: int = 1280, height: int = 900) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        for flag in (*_FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(
            options=options, service=webdriver.ChromeService(str(shutil.which("chromedriver")))
        )
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        self.driver.implicitly_wait(10)  # for what is clicked or typed into

    def open(self, url: str, ready: str) -> float:
        """Go to a page and wait until the script `ready` is true; seconds from navigation to then."""
        self.driver.get("about:blank")
        self.forget()
        begun = time.perf_counter()
        self.driver.get(url)
        self.wait(ready)
        return time.perf_counter() - begun

    def wait(self, script: str, seconds: float = 40) -> Any:
        """Wait until a script gives something true, and give that."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.js(script):
                return value
            time.sleep(0.02)
        raise AssertionError(f"never true: {script}\npage: {self.js('return document.body.innerText')[:800]}")

    def settle(self, seconds: float = 90) -> None:
        """Wait until the page's heading is there and no callback is waited for."""
        self.wait(_SETTLED, seconds)

    def js(self, script: str, *arguments: Any, seconds: float = 10) -> Any:
        """What a script gives; one that meets something not there yet is asked again, as a person would look again."""
        from selenium.common.exceptions import JavascriptException

        end = time.monotonic() + seconds
        while True:
            try:
                return self.driver.execute_script(script if "return" in script else f"return {script}", *arguments)
            except JavascriptException as missed:
                if "Cannot read properties of" not in str(missed) or time.monotonic() > end:
                    raise
                time.sleep(0.05)

    def click(self, selector: str) -> None:
        from selenium.webdriver.common.by import By

        self.driver.find_element(By.CSS_SELECTOR, selector).click()

    def type(self, selector: str, text: str) -> None:
        from selenium.webdriver.common.by import By

        self.driver.find_element(By.CSS_SELECTOR, selector).send_keys(text)

    def forget(self) -> None:
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in {"SEVERE", "WARNING"}]

    def asked_for(self) -> set[str]:
        """Addresses of every request since the last `open`."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}


@pytest.fixture(scope="session")
def browser_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Browser]]:
    """Starts a browser with a profile of its own."""
    for program in ("chromium", "chromedriver"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    started: list[Browser] = []

    def start(**options: Any) -> Browser:
        started.append(Browser(tmp_path_factory.mktemp("profile"), **options))
        return started[-1]

    yield start
    for browser in started:
        browser.driver.quit()


@pytest.fixture(scope="session")
def browser(browser_of: Callable[..., Browser]) -> Browser:
    return browser_of()


@pytest.fixture(scope="session")
def serve_store(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[Callable[[Store], None]], tuple[str, Path]]]:
    """Fills a new store, serves it from a thread, and gives its address and path."""
    running: list[tuple[Any, threading.Thread]] = []

    def start(fill: Callable[[Store], None]) -> tuple[str, Path]:
        path = tmp_path_factory.mktemp("store") / "runs.duckdb"
        with Store(path) as store:
            fill(store)
        up, seen = threading.Event(), {}
        failures: list[BaseException] = []

        def ready(url: str, server: Any) -> None:
            seen.update(url=url, server=server)
            up.set()

        def run() -> None:
            try:
                serve(path, port=0, ready=ready)
            except BaseException as failure:
                failures.append(failure)
                up.set()
                raise

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        assert up.wait(60)
        if failures:
            raise failures[0]
        running.append((seen["server"], thread))
        return seen["url"].rstrip("/"), path

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join(10)


@pytest.fixture(scope="session")
def plan() -> Any:
    """Builds the plan of a planted run."""
    return planted.Plan


@pytest.fixture(scope="session")
def text() -> Any:
    """Builds one text of a planted run."""
    return planted.Text


@pytest.fixture(scope="session")
def plant() -> Any:
    """Writes a planted run into a store."""
    return planted.plant


@pytest.fixture(scope="session")
def moe(serve_store: Any, plan: Any, plant: Any) -> tuple[str, Path]:
    """A served store with a mixture-of-experts run, `planted`, long enough to scroll, and a second one, `second`."""

    def fill(store: Store) -> None:
        plant(store, plan(name="second", seed=1))
        plant(store, plan(texts=plan().texts * 30))

    return serve_store(fill)
