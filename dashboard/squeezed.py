"""Scripts and styles sent as small as they get: compressed once with brotli's highest effort, and kept.

The first request for a file is answered with a quick compression while the slow one runs on a thread; its outcome is kept
in memory and in the user's cache folder, for later starts.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from pathlib import Path

import brotli  # type: ignore[import-untyped]  # it has no stubs
from flask import Flask, Response, request

from moescope.core.atomic import written_whole
from moescope.core.errors import InputError

_QUICK, _BEST = 9, 11
_WORTH = 1500  # bytes; less is not made smaller by much
_SCRIPTS = ("/_dash-component-suites/", "/assets/")
_KINDS = frozenset({"application/javascript", "text/javascript", "text/css"})


def squeeze(server: Flask, folder: Path | None = None) -> None:
    """Answer requests for scripts and styles with their brotli form, where the browser reads it.

    Args:
        server: the Flask server behind the app.
        folder: where compressed files are kept between starts; None for the user's cache folder.
    """
    kept = _Kept(folder or _cache_folder())

    @server.after_request
    def send_small(response: Response) -> Response:
        wanted = response.status_code == 200 and request.path.startswith(_SCRIPTS) and response.mimetype in _KINDS
        if not wanted or "Content-Encoding" in response.headers or not request.accept_encodings["br"]:
            return response
        response.direct_passthrough = False
        plain = response.get_data()
        if len(plain) < _WORTH:
            return response
        response.set_data(kept.small(plain))
        response.headers["Content-Encoding"] = "br"
        response.vary.add("Accept-Encoding")
        if (tag := response.get_etag()[0]) is not None:
            response.set_etag(f"{tag}-br")
        return response


def _cache_folder() -> Path | None:
    """None for a user without a home."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(base) / "moescope" / "scripts"


class _Kept:
    """Compressed files by the hash of their content, in memory and in a folder; a folder that cannot be written is done without,
    and so is none.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._best: dict[str, bytes] = {}
        self._quick: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None

    def small(self, plain: bytes) -> bytes:
        """The best form there is yet."""
        key = hashlib.sha256(plain).hexdigest()
        if (found := self._best.get(key) or self._read(key)) is not None:
            return found
        with self._lock:
            if key not in self._quick:
                self._quick[key] = brotli.compress(plain, quality=_QUICK)
                self._queue.put((key, plain))
                if self._worker is None:
                    self._worker = threading.Thread(target=self._improve, name="moescope-brotli", daemon=True)
                    self._worker.start()
        return self._quick[key]

    def _read(self, key: str) -> bytes | None:
        if self.folder is None:
            return None
        try:
            found = (self.folder / f"{key}.br").read_bytes()
            whole = hashlib.sha256(brotli.decompress(found)).hexdigest() == key
        except (OSError, brotli.error):
            return None
        if not whole:
            return None
        self._best[key] = found
        return found

    def _improve(self) -> None:
        while True:
            key, plain = self._queue.get()
            self._best[key] = best = brotli.compress(plain, quality=_BEST)
            if self.folder is None:
                continue
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                with written_whole(self.folder / f"{key}.br") as partial:
                    partial.write_bytes(best)
            except (OSError, InputError):  # a home that is read-only or full; memory has it
                continue
