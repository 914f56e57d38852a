"""Pictures of figures for saved notebooks: one browser draws them all, and is closed when it is not needed for a while."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import queue
import threading
from concurrent.futures import Future
from typing import Any

# Seconds: for one picture at most; without a picture until the browser is closed.
_PATIENCE, _IDLE = 60.0, 120.0
_WIDTH, _HEIGHT, _SCALE = 800, 450, 1.5

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_Job = tuple[dict[str, Any], Future[bytes]]
_jobs: queue.Queue[_Job | None] = queue.Queue()
_state: dict[str, Any] = {"thread": None, "failed": False}


def size_of(figure: Any) -> tuple[int, int]:
    """Width and height of a figure's picture, in CSS pixels."""
    layout = figure.layout
    return int(layout.width or _WIDTH), int(layout.height or _HEIGHT)


def png_of(figure: Any) -> bytes | None:
    """The figure as a PNG; None where no kaleido or no browser is installed, or the browser fails.

    A browser that failed once is not asked again in this process: a cell should not wait for it twice.
    """
    if _state["failed"]:
        return None
    done: Future[bytes] = Future()
    with _lock:
        _jobs.put((figure.to_dict(), done))
        if _state["thread"] is None:
            thread = threading.Thread(target=_draw_all, name="moescope pictures", daemon=True)
            _state["thread"] = thread
            thread.start()
    try:
        return done.result(timeout=_PATIENCE)
    except Exception as failure:  # noqa: BLE001  whatever the browser does, the cell shows its numbers
        _log.debug("no picture of a figure: %s", failure)
        _state["failed"] = True
        return None


def _draw_all() -> None:
    """Draw what is asked for, until nothing was for a while."""
    try:
        asyncio.run(_serve())
    except Exception as failure:  # noqa: BLE001  handed on to those who wait
        with _lock:
            _state["thread"] = None
            while not _jobs.empty():
                if (job := _jobs.get_nowait()) is not None:
                    job[1].set_exception(failure)


def _after_fork() -> None:
    """A child process has neither the thread nor the browser of its parent."""
    global _lock, _jobs  # the parent's may be held for ever
    _lock, _jobs = threading.Lock(), queue.Queue()
    _state.update(thread=None, failed=False)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _close() -> None:
    """Close the browser with the program, so that its folder of settings goes too."""
    if (thread := _state["thread"]) is not None:
        _jobs.put(None)
        thread.join(timeout=5)


async def _serve() -> None:
    job = _jobs.get()
    try:
        import kaleido

        # The browser's pipe now and then holds a message cut short; it is skipped without harm, but logged.
        logging.getLogger("choreographer").setLevel(logging.CRITICAL)
        # Its page would ask another host for MathJax, and wait for it.
        async with kaleido.Kaleido(timeout=_PATIENCE, mathjax=False) as browser:
            atexit.unregister(_close)
            atexit.register(_close)  # once the browser's own are: what is registered last runs first
            while job is not None:
                await _draw(browser, job)
                try:
                    job = _jobs.get(timeout=_IDLE)  # the loop stands still meanwhile: nobody else is on it
                except queue.Empty:
                    with _lock:
                        if _jobs.empty():
                            _state["thread"] = None
                            return
                        job = _jobs.get_nowait()
    except BaseException as failure:
        if job is not None and not job[1].done():
            job[1].set_exception(failure)
        raise


async def _draw(browser: Any, job: _Job) -> None:
    figure, done = job
    layout = figure.get("layout", {})
    options = {
        "format": "png",
        "width": int(layout.get("width") or _WIDTH),
        "height": int(layout.get("height") or _HEIGHT),
        "scale": _SCALE,
    }
    done.set_result(await browser.calc_fig(figure, opts=options))
